#!/usr/bin/env bash
# DMDR on the tiny SD3, FLUX.1 and Qwen-Image: cold start, DMD with two reward models, evaluation beside the teacher.  Stopped,
# it goes on where it was.
#
#   bash scripts/families.sh                       runs/families; WORK=DIR for another folder
#   FAMILIES="flux" bash scripts/families.sh       one of sd3 flux qwen_image, or several
set -euo pipefail
WORK="${WORK:-$(pwd -P)/runs/families}"
FAMILIES="${FAMILIES:-sd3 flux qwen_image}"
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

distil() { # LAUNCHER'S NAME: a cold start, DMD with rewards from where it ends, a row of the table for each
  local cold="cold_start_$1" dmdr="dmdr_$1_refl"
  stage "$cold" train "$cold" "$cold"
  stage "$dmdr" train "$dmdr" "$dmdr"
  stage "evaluate-$1" evaluate "cold-$1,dmdr-$1" "$WORK/$cold" "$WORK/$dmdr"
}

stage scenes scenes
runs=()
for family in $FAMILIES; do
  [[ "$family" =~ ^(sd3|flux|qwen_image)$ ]] || setup_fail "FAMILIES: unknown family $family" "one of sd3 flux qwen_image"
  stage "evaluate-teacher-$family" evaluate_teacher "$family" "teacher-$family"
  if [[ "$family" == sd3 ]]; then names=(sd3); else names=("${family}_4step" "${family}_2step"); fi
  for name in "${names[@]}"; do
    distil "$name"
    runs+=("$WORK/cold_start_$name" "$WORK/dmdr_${name}_refl")
  done
done
stage report "$PYTHON" -m train_t2i report "${runs[@]}" --table "$TABLE" --out "$WORK/report"
printf 'table:  %s\nreport: %s\n' "$TABLE" "$WORK/report"
