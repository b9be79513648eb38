#!/usr/bin/env bash
# The guard at work on the tiny world: a reward that is easily gamed (colour saturation) is followed three times, with the
# guard warning, scaling and stopping; the recipe's own rewards once, where it has to stay silent; then one report of all four.
#
#   bash scripts/guard_demo.sh                 runs/guard-demo; WORK=DIR for another folder
#   QUICK=1 bash scripts/guard_demo.sh         some minutes, for a look; runs/guard-demo-quick
set -euo pipefail
NUM_PAIRS=768 ODE=350 COLD=100 LENGTH=80 EVERY=10 SEEN=16 FOLDER=guard-demo
if [[ "${QUICK:-0}" == 1 ]]; then
  NUM_PAIRS=64 ODE=10 COLD=12 LENGTH=4 EVERY=2 SEEN=2 FOLDER=guard-demo-quick
  export BATCH_SIZE=2 TEACHER_NUM_STEPS=2
fi
WORK="${WORK:-$(pwd -P)/runs/$FOLDER}"
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

GAMED=9                                                  # exit code of --reward-guard stop
BAIT="${BAIT:-30}"                                       # weight of the reward that is easily gamed
WITHOUT=(CLIP_REWARD_MODEL=- HPSV2_REWARD_MODEL=- REWARD_CLIP_WEIGHT=- REWARD_HPS_WEIGHT=- REWARD_MARGIN=- MAGIC_PROMPT=-)

guarded() { # NAME GUARD FLAGS...: rewards from the cold start's checkpoint, watched by a tower that is in no loss
  local name="$1" guard="$2"
  shift 2
  RESUME_CKPT="$(records cold "$COLD")" train dmdr_sdxl_refl "$name" --max-train-steps $((COLD + LENGTH)) \
    --cold-start-iter "$COLD" --lr-scheduler constant --sample-steps "$EVERY" --checkpoint-steps "$EVERY" \
    --batch-size-test "$SEEN" --monitor-rewards "clip=$CHECKPOINTS/tiny-clip-heldout" \
    --monitor-reference "$WORK/reference/metadata.csv" --reward-guard "$guard" "$@"
}

bait() { # GUARD WEIGHT: saturation alone is rewarded; a stop by the guard is what is wanted
  local code=0
  (
    export "${WITHOUT[@]}"
    guarded "bait-$1" "$1" --extra-rewards "$2*shapes.bait:saturation" --extra-reward-margin 1
  ) || code=$?
  [[ "$code" == 0 || ("$1" == stop && "$code" == "$GAMED") ]] || return "$code"
}

stage scenes scenes
stage pairs pairs "$NUM_PAIRS"
DATA_PATH_TRAIN="$WORK/pairs" stage ode train ode_init_sdxl ode --max-train-steps "$ODE" --sample-steps 0
XL_ODE_PRETRAIN_PATH="$(records ode "$ODE")" stage cold train cold_start_sdxl cold --max-train-steps "$COLD" \
  --cold-start-iter "$COLD" --sample-steps 0
stage recipe guarded recipe warn
for guard in warn scale stop; do
  stage "bait-$guard" bait "$guard" "$BAIT"
done
stage report "$PYTHON" -m train_t2i report "$WORK"/{recipe,bait-warn,bait-scale,bait-stop} --out "$WORK/report" \
  --title "Rewards that are watched"
grep -h "reward guard" "$WORK"/{recipe,bait-warn,bait-scale}/log.txt || true
printf 'report: %s\n' "$WORK/report"
