#!/usr/bin/env bash
# The rows that SDXL's four DMDR launchers share, after those of every stage.
# shellcheck source=scripts/sdxl.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/sdxl.sh"

PROMPTS=t2i-2m-filtered-prompts.txt # in the folder where the launcher is called, or where `fetch` puts it
[[ -e "$PROMPTS" ]] || PROMPTS="$CHECKPOINTS/$PROMPTS"

#       flag             published                    tiny world: docs/recipe.md says why
setting method           dmdr
setting data-path-train  "$PROMPTS"                   "${OUTPUT_DIR:-runs}/prompts.txt"
setting lora-rank        32                           16
setting lora-scale-f     2.0
setting cfg-r            7                            1.5
setting cfg-f            1
setting ratio-update     5                            2
setting lr-warmup-steps  0                            10
setting batch-size-test  2                            8
setting teacher-cfg      7                            "$TINY_GUIDANCE"

one_step() { # conditioned at level 399, both dynamic strategies off
  setting sample-num-steps  1
  setting s-type-gui        uniform  beta
  setting gui-a             -        2
  setting gui-b             -        4
}

four_steps() { # dynamic guidance and dynamic renoise sampling
  setting sample-num-steps  4
  setting dynamic-step      2000     50
  setting lora-scale-r      0.5
  setting s-type-gen        uniform
  setting s-type-gui        beta     uniform
  setting gui-a             4        -
  setting gui-b             1.5      -
}
