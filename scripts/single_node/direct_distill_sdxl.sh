#!/usr/bin/env bash
# Direct Distillation of SDXL to four steps: a LoRA.  No recipe was published for it: Qwen-Image's.
#
#   bash scripts/single_node/direct_distill_sdxl.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/sdxl.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl.sh"
# shellcheck source=scripts/direct.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../direct.sh"

direct pairs
lora
#       flag              published  tiny world
setting exp-name          direct_distill_sdxl
setting sample-num-steps  4
setting batch-size-test   2          8
launch "$@"
