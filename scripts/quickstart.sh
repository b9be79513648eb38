#!/usr/bin/env bash
# From a fresh clone to a one-step generator, on a machine without a GPU: pairs from the teacher, ODE initialisation, cold
# start (DMD), DMD with two reward models, evaluation on held-out prompts, a report.  Stopped, it goes on where it was.
#
#   bash scripts/quickstart.sh                 runs/quickstart; WORK=DIR for another folder
#   QUICK=1 bash scripts/quickstart.sh         a few minutes, for a look: too short to reach the published figures;
#                                              runs/quickstart-quick
set -euo pipefail
RUNS="$(pwd -P)/runs"
NUM_PAIRS=768
SHORT=()
if [[ "${QUICK:-0}" == 1 ]]; then
  WORK="${WORK:-$RUNS/quickstart-quick}"
  NUM_PAIRS=256
  EVALUATION_PROMPTS=100
  SHORT=(--sample-steps 0)
fi
WORK="${WORK:-$RUNS/quickstart}"
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

steps() { # NORMAL QUICK: how many steps a stage takes
  if [[ "${QUICK:-0}" == 1 ]]; then echo "$2"; else echo "$1"; fi
}
ODE_STEPS="$(steps 350 100)"
COLD_STEPS="$(steps 100 10)"
DMDR_STEPS="$(steps 300 20)"

stage scenes scenes
stage pairs pairs "$NUM_PAIRS"
DATA_PATH_TRAIN="$WORK/pairs" stage ode-1 train ode_init_sdxl ode-1 --max-train-steps "$ODE_STEPS" ${SHORT[@]+"${SHORT[@]}"}
export XL_ODE_PRETRAIN_PATH="$WORK/ode-1/checkpoints/torch_units/step-$ODE_STEPS.pt"
stage cold-1 train cold_start_sdxl cold-1 --max-train-steps "$COLD_STEPS" --cold-start-iter "$COLD_STEPS" ${SHORT[@]+"${SHORT[@]}"}
export RESUME_CKPT="$WORK/cold-1/checkpoints/torch_units/step-$COLD_STEPS.pt"
unset XL_ODE_PRETRAIN_PATH
stage dmdr-1 train dmdr_sdxl_refl dmdr-1 --max-train-steps "$DMDR_STEPS" --cold-start-iter "$COLD_STEPS" ${SHORT[@]+"${SHORT[@]}"}
stage evaluate-teacher evaluate_teacher
stage evaluate-students evaluate ode-1,cold-1,dmdr-1 "$WORK/ode-1" "$WORK/cold-1" "$WORK/dmdr-1"
stage report "$PYTHON" -m train_t2i report "$WORK/ode-1" "$WORK/cold-1" "$WORK/dmdr-1" --table "$WORK/table.json" --out "$WORK/report"
printf 'table:  %s\nreport: %s\n' "$WORK/table.json" "$WORK/report"
