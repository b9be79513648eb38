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

distil_qwen_image() { # in two steps and in four, either from a student of Direct Distillation; the four-step one's goes on from the other's
  local two=direct_qwen_image_2step four=direct_qwen_image_4step
  # few steps follow less of what they are told than the teacher: more guidance than its own, in the pairs as in the score
  stage pairs-qwen_image pairs 1536 qwen_image 4
  regress "$two" --sample-num-steps 2 --max-train-steps 1200
  regress "$four" --generator-init "$WORK/$two/checkpoints/lora_gen/step-1200" --max-train-steps 300
  stage "merge-$four" merge "$four"
  refine qwen_image_4step "$WORK/$four/merged"
  refine qwen_image_2step "$WORK/$two/checkpoints/lora_gen/step-1200"
}

regress() { # RUN FLAGS...: Direct Distillation on the grid of the launchers' other stages
  local run="$1"
  shift
  DATA_PATH_TRAIN="$WORK/pairs_qwen_image" stage "$run" train direct_distill_qwen_image_lora "$run" --shift 3.2 --checkpoint-steps 300 "$@"
  stage "evaluate-$run" evaluate "${run/_/-}" "$WORK/$run"
  runs+=("$WORK/$run")
}

merge() { # RUN: its generator's whole weights, in RUN/merged
  rm -rf -- "${WORK:?}/$1/merged"
  "$PYTHON" -m train_t2i export --run "$WORK/$1" --to merged --out "$WORK/$1/merged"
}

refine() { # LAUNCHERS' NAME, WHAT A STUDENT STARTS FROM: 50 steps of the cold start, 100 with rewards, of its last call alone
  local cold="cold_start_$1" dmdr="dmdr_$1_refl"
  # layout is right by then: mostly low noise, small rates, little reward (docs/recipe.md)
  local -a flags=(--generator-init "$2" --cold-start-iter 50 --dynamic-step 0 --s-type-gui beta --gui-a 2 --gui-b 4 --cfg-r 5)
  flags+=(--s-type-gen beta --gen-a 1 --gen-b 20)
  export LORA_SCALE_R=- # nothing is borrowed where --dynamic-step is 0
  stage "$cold" train "$cold" "$cold" "${flags[@]}" --learning-rate-gen 1e-4 --max-train-steps 50
  RESUME_CKPT="$(records "$cold" 50)" stage "$dmdr" train "$dmdr" "$dmdr" "${flags[@]}" \
    --learning-rate-gen 5e-5 --max-train-steps 150 --reward-clip-weight 1.5 --reward-hps-weight 0.4
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
