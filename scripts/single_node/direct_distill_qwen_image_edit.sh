#!/usr/bin/env bash
# Direct Distillation of Qwen-Image-Edit-2509 to four steps: a LoRA.  Its teacher's results come first (scripts/direct.sh says how;
# --data-path-train of pairs is the table of edits).
#
#   bash scripts/single_node/direct_distill_qwen_image_edit.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"
# shellcheck source=scripts/direct.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../direct.sh"

every_method
qwen_image_edit 4
direct pairs_qwen_image_edit
lora
#       flag          published  tiny world
setting exp-name      direct_distill_qwen_image_edit
setting num-workers   4          0
launch "$@"
