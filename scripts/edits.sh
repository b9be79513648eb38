#!/usr/bin/env bash
# Four-step students of the tiny Qwen-Image-Edit, by Direct Distillation and by distribution matching, each from the teacher's
# own weights; both beside the teacher on held-out edits of one source and of two.  Stopped, it goes on where it was.
#
#   bash scripts/edits.sh                          runs/edits; WORK=DIR for another folder
set -euo pipefail
WORK="${WORK:-$(pwd -P)/runs/edits}"
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

heldout() { # FOLDER KINDS...: edits that no training shows
  local folder="$WORK/$1"
  shift
  "$PYTHON" -m shapes.edits render --split heldout --count "$EVALUATION_PROMPTS" --seed 7 --out "$folder" --kinds "$@"
}

edits() { # the data: edits to train on, and two sets to judge by
  tiny_edits "$WORK/edits"
  heldout one recolour resize reshape background move swap
  heldout two compose
}

judged() { # NAME FLAGS...: a row of three tables: the share of edits that are right, of one source and of two, and what became of the rest
  local name="$1" judge
  shift
  for judge in one:edit_adherence two:edit_adherence one:untouched; do
    "$PYTHON" -m train_t2i evaluate "$@" --name "$name" --out "$WORK/${judge/:/-}.json" --prompts "$WORK/${judge%%:*}/metadata.json" \
      --count "$EVALUATION_PROMPTS" --batch-size 50 --scorer "shapes.edit_oracle:${judge##*:}" --save-images "$WORK/grids/${judge%%:*}"
  done
}

student() { # LAUNCHER FLAGS...: trained and judged
  local launcher="$1"
  shift
  stage "$launcher" train "$launcher" "$launcher" --sample-prompts "$WORK/one/metadata.json" "$@"
  stage "judge-$launcher" judged "$launcher" "$WORK/$launcher"
}

stage edits edits
tiny_teacher qwen_image_edit
stage judge-teacher judged teacher --teacher "${TEACHER[@]}" --teacher-num-steps 25 --teacher-cfg "$TEACHER_CFG" --mixed-precision no
stage pairs tiny_pairs "$WORK/pairs_qwen_image_edit" "$WORK/edits/metadata.json" 768 qwen_image_edit
DATA_PATH_TRAIN="$WORK/pairs_qwen_image_edit" student direct_distill_qwen_image_edit
DATA_PATH_TRAIN="$WORK/edits/metadata.json" student cold_start_qwen_image_edit_4step
stage report "$PYTHON" -m train_t2i report "$WORK"/{direct_distill,cold_start}_qwen_image_edit* --out "$WORK/report"
printf 'tables: %s\nreport: %s\n' "$WORK/{one-edit_adherence,two-edit_adherence,one-untouched}.json" "$WORK/report"
