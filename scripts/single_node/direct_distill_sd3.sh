#!/usr/bin/env bash
# Direct Distillation of SD3-medium to four steps: a LoRA.  No recipe was published for it: Qwen-Image's.
#
#   bash scripts/single_node/direct_distill_sd3.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"
# shellcheck source=scripts/direct.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../direct.sh"

every_method
sd3
direct pairs_sd3
lora
#       flag          published  tiny world
setting exp-name      direct_distill_sd3
launch "$@"
