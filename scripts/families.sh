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

COLD=100 DMDR=300 # steps at which the stages end

teacher_of() { # FAMILY: the flags of its teacher
  case "$1" in
    sd3) printf '%s\n' --pretrained-model "$CHECKPOINTS/tiny-sd3" --teacher-cfg 2 --text-length 32 ;;
    flux) printf '%s\n' --pretrained-model "$CHECKPOINTS/tiny-flux" --teacher-cfg 1 --guidance-embed 2 --text-length 32 ;;
    qwen_image) printf '%s\n' --pretrained-model "$CHECKPOINTS/tiny-qwen-image" --teacher-cfg 2 ;;
    *) setup_fail "FAMILIES: unknown family $1" "one of sd3 flux qwen_image" ;;
  esac
}

distil() { # LAUNCHER'S NAME: a cold start, DMD with rewards, a row of the table for each
  local name="$1" from
  from="$WORK/cold-$name/checkpoints/torch_units/step-$COLD.pt"
  stage "cold-$name" train "cold_start_$name" "cold-$name" --max-train-steps "$COLD" --cold-start-iter "$COLD"
  RESUME_CKPT="$from" stage "dmdr-$name" train "dmdr_${name}_refl" "dmdr-$name" --max-train-steps "$DMDR"
  stage "evaluate-$name" evaluate "cold-$name,dmdr-$name" "$WORK/cold-$name" "$WORK/dmdr-$name"
}

stage scenes scenes
runs=()
for family in $FAMILIES; do
  teacher="$(teacher_of "$family")"
  flags=()
  while IFS= read -r flag; do flags+=("$flag"); done <<<"$teacher" # macOS's bash 3.2 has no mapfile
  stage "evaluate-teacher-$family" evaluate "teacher-$family" --teacher "${flags[@]}" --teacher-num-steps 25 --resolution 64
  if [[ "$family" == sd3 ]]; then names=(sd3); else names=("${family}_4step" "${family}_2step"); fi
  for name in "${names[@]}"; do
    distil "$name"
    runs+=("$WORK/cold-$name" "$WORK/dmdr-$name")
  done
done
stage report "$PYTHON" -m train_t2i report "${runs[@]}" --table "$TABLE" --out "$WORK/report"
printf 'table:  %s\nreport: %s\n' "$TABLE" "$WORK/report"
