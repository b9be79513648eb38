#!/usr/bin/env bash
# What each part of DMDR's second stage is worth, on the one-step tiny SDXL: one reward or both, how much they weigh beside
# distribution matching, rewards after distillation instead of jointly, rewards alone.  All arms begin at the same cold start
# and take as many steps with rewards.  Stopped, it goes on where it was.
#
#   bash scripts/ablations.sh                  runs/ablations; WORK=DIR for another folder, SEED=N for another seed
#   QUICK=1 bash scripts/ablations.sh          some minutes, for a look; runs/ablations-quick
set -euo pipefail
NUM_PAIRS=768 ODE=350 COLD=100 DMDR=300 FOLDER=ablations
if [[ "${QUICK:-0}" == 1 ]]; then
  NUM_PAIRS=32 ODE=4 COLD=6 DMDR=8 FOLDER=ablations-quick
  export BATCH_SIZE=2 EVALUATION_PROMPTS=8
fi
WORK="${WORK:-$(pwd -P)/runs/$FOLDER}"
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

arm() { # NAME CLIP_WEIGHT HPS_WEIGHT FLAGS...: from the cold start
  local name="$1"
  RESUME_CKPT="$(records cold "$COLD")" REWARD_CLIP_WEIGHT="$2" REWARD_HPS_WEIGHT="$3" stage "$name" \
    train dmdr_sdxl_refl "$name" --max-train-steps "$DMDR" --cold-start-iter "$COLD" --sample-steps 0 "${@:4}"
  arms+=("$name")
}

stage scenes scenes
stage pairs pairs "$NUM_PAIRS"
DATA_PATH_TRAIN="$WORK/pairs" stage ode train ode_init_sdxl ode --max-train-steps "$ODE" --sample-steps 0
XL_ODE_PRETRAIN_PATH="$(records ode "$ODE")" stage cold train cold_start_sdxl cold --max-train-steps "$COLD" \
  --cold-start-iter "$COLD" --sample-steps 0

arms=(cold)
arm no-rewards 0 0
arm clip-only 1 0
arm hps-only 0 1
arm both-0.1 0.1 0.1
arm both-0.5 0.5 0.5
arm both-1 1 1
arm both-2 2 2
arm rewards-alone 1 1 --dmd-weight 0
RESUME_CKPT="$(records no-rewards "$DMDR")" stage distil-then-rewards train dmdr_sdxl_refl distil-then-rewards \
  --max-train-steps $((2 * DMDR - COLD)) --cold-start-iter "$DMDR" --dmd-weight 0 --sample-steps 0
arms+=(distil-then-rewards)

stage evaluate-teacher evaluate_teacher
names="$(IFS=,; printf '%s' "${arms[*]}")"
stage evaluate evaluate "$names" "${arms[@]/#/$WORK/}"
stage report "$PYTHON" -m train_t2i report "${arms[@]/#/$WORK/}" --table "$TABLE" --out "$WORK/report" --title "Ablations"
printf 'table:  %s\nreport: %s\n' "${TABLE%.json}.md" "$WORK/report"
