#!/usr/bin/env bash
# DMDR on the tiny SD3, FLUX.1 and Qwen-Image: cold start, DMD with two reward models, evaluation beside the teacher; SD3's
# generator in full, the others' as LoRA; Qwen-Image from a student of Direct Distillation.  Stopped, it goes on where it was.
#
#   bash scripts/families.sh                       runs/families; WORK=DIR for another folder
#   FAMILIES="flux" bash scripts/families.sh       one of sd3 flux qwen_image, or several
set -euo pipefail
WORK="${WORK:-$(pwd -P)/runs/families}"
FAMILIES="${FAMILIES:-sd3 flux qwen_image}"
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

distil() { # LAUNCHER'S NAME [RATES]: a cold start, DMD with rewards from where it ends, a row of the table for each
  local cold="cold_start_$1" dmdr="dmdr_$1_refl"
  local -a in_cold=() in_dmdr=()
  if (($# > 1)); then # the rates of either stage, of a generator of which all weights are trained
    in_cold=(--use-lora-gen off --learning-rate-gen "$2") in_dmdr=(--use-lora-gen off --learning-rate-gen "$3")
  fi
  stage "$cold" train "$cold" "$cold" ${in_cold[@]+"${in_cold[@]}"}
  stage "$dmdr" train "$dmdr" "$dmdr" ${in_dmdr[@]+"${in_dmdr[@]}"}
  stage "evaluate-$1" evaluate "cold-$1,dmdr-$1" "$WORK/$cold" "$WORK/$dmdr"
  runs+=("$WORK/$cold" "$WORK/$dmdr")
}

distil_qwen_image() { # in four steps from a student of Direct Distillation, in two from the four-step one
  local direct=direct_qwen_image_4step
  stage pairs-qwen_image pairs 1536 qwen_image
  DATA_PATH_TRAIN="$WORK/pairs_qwen_image" stage "$direct" train direct_distill_qwen_image_lora "$direct" --max-train-steps 400
  stage "evaluate-$direct" evaluate direct-qwen_image_4step "$WORK/$direct"
  runs+=("$WORK/$direct")
  refine qwen_image_4step "$WORK/$direct/checkpoints/lora_gen/step-400" 50 1e-4
  refine qwen_image_2step "$WORK/cold_start_qwen_image_4step/checkpoints/lora_gen/step-50" 200 2e-4
}

refine() { # LAUNCHERS' NAME, A STUDENT'S LORA, THE COLD START'S STEPS AND RATE: goes on from a student, at last 100 steps with rewards
  local cold="cold_start_$1" dmdr="dmdr_$1_refl"
  # layout is right by then: mostly low noise, small rates, little reward (docs/recipe.md)
  local -a flags=(--generator-init "$2" --cold-start-iter "$3" --dynamic-step 0 --s-type-gui beta --gui-a 2 --gui-b 4)
  export LORA_SCALE_R=- # nothing is borrowed where --dynamic-step is 0
  stage "$cold" train "$cold" "$cold" "${flags[@]}" --learning-rate-gen "$4" --max-train-steps "$3"
  RESUME_CKPT="$(records "$cold" "$3")" stage "$dmdr" train "$dmdr" "$dmdr" "${flags[@]}" \
    --learning-rate-gen 5e-5 --max-train-steps $(($3 + 100)) --reward-clip-weight 1 --reward-hps-weight 0.1
  unset LORA_SCALE_R
  stage "evaluate-$1" evaluate "cold-$1,dmdr-$1" "$WORK/$cold" "$WORK/$dmdr"
  runs+=("$WORK/$cold" "$WORK/$dmdr")
}

stage scenes scenes
runs=()
for family in $FAMILIES; do
  [[ "$family" =~ ^(sd3|flux|qwen_image)$ ]] || setup_fail "FAMILIES: unknown family $family" "one of sd3 flux qwen_image"
  teacher_rows "$family" "teacher-$family"
  case "$family" in
    sd3) distil sd3 5e-5 3e-5 ;; # its LoRA students stay below their teacher (docs/recipe.md)
    flux)
      distil flux_4step
      distil flux_2step
      ;;
    qwen_image) distil_qwen_image ;;
  esac
done
stage report "$PYTHON" -m train_t2i report "${runs[@]}" --table "$TABLE" --out "$WORK/report"
printf 'table:  %s\nreport: %s\n' "$TABLE" "$WORK/report"
