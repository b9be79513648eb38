#!/usr/bin/env bash
# Makes the whole table of the README on the tiny world: every stage, three training seeds for the one-step rows, and the
# ablations.  At most two and a half hours on 2 cores; stopped, it goes on where it was.
#
#   bash scripts/reproduce.sh                  runs/reproduce; WORK=DIR for another folder
set -euo pipefail
WORK="${WORK:-$(pwd -P)/runs/reproduce}"
TABLE="$WORK/evaluations.json" # a row a training seed; table.json has their means
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

SEEDS=(30 31 32)
ODE=350 COLD=100 DMDR=300 # steps at which the stages end

stage2() { # FROM STEP EXP_NAME FLAGS...: a second stage of one step
  local from
  from="$(records "$1" "$2")"
  shift 2
  RESUME_CKPT="$from" stage "$1" train dmdr_sdxl_refl "$@" --max-train-steps "$DMDR" --sample-steps 0
}

stage scenes scenes
stage pairs pairs 768
stage evaluate-teacher evaluate_teacher

for SEED in "${SEEDS[@]}"; do
  export SEED
  DATA_PATH_TRAIN="$WORK/pairs" stage "ode-1-seed$SEED" train ode_init_sdxl "ode-1-seed$SEED" --max-train-steps "$ODE"
  XL_ODE_PRETRAIN_PATH="$(records "ode-1-seed$SEED" "$ODE")" stage "cold-1-seed$SEED" \
    train cold_start_sdxl "cold-1-seed$SEED" --max-train-steps "$COLD" --cold-start-iter "$COLD"
  stage2 "cold-1-seed$SEED" "$COLD" "dmdr-1-seed$SEED"
  stage2 "cold-1-seed$SEED" "$COLD" "dmd-only-1-seed$SEED" --cold-start-iter "$DMDR"
  for model in ode-1 cold-1 dmdr-1 dmd-only-1; do
    stage "evaluate-$model-seed$SEED" evaluate "$model-seed$SEED" "$WORK/$model-seed$SEED"
  done
done

SEED="${SEEDS[0]}"
export SEED
first="seed$SEED"
stage cold-4 train cold_start_sdxl_4step cold-4 --max-train-steps "$COLD" --cold-start-iter "$COLD"
RESUME_CKPT="$(records cold-4 "$COLD")" stage dmdr-4 train dmdr_sdxl_4step_refl dmdr-4 --max-train-steps "$DMDR"
for model in cold-4 dmdr-4; do
  stage "evaluate-$model" evaluate "$model" "$WORK/$model"
done

for SEED in "${SEEDS[@]}"; do
  export SEED
  stage2 "cold-1-seed$SEED" "$COLD" "rl-only-1-seed$SEED" --dmd-weight 0
  RESUME_CKPT="$(records "dmd-only-1-seed$SEED" "$DMDR")" stage "distil-then-rl-1-seed$SEED" \
    train dmdr_sdxl_refl "distil-then-rl-1-seed$SEED" --max-train-steps $((2 * DMDR - COLD)) --dmd-weight 0 \
    --cold-start-iter "$DMDR" --sample-steps 0
  for model in rl-only-1 distil-then-rl-1; do
    stage "evaluate-$model-seed$SEED" evaluate "$model-seed$SEED" "$WORK/$model-seed$SEED"
  done
done

"$PYTHON" "$SETUP_ROOT/scripts/mean_table.py" "$TABLE" "$WORK/table.json"
stage report "$PYTHON" -m train_t2i report "$WORK/ode-1-$first" "$WORK/cold-1-$first" "$WORK/dmdr-1-$first" \
  "$WORK/cold-4" "$WORK/dmdr-4" --table "$WORK/table.json" --out "$WORK/report"
printf 'table:  %s\nreport: %s\n' "$WORK/table.json" "$WORK/report"
