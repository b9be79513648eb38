#!/usr/bin/env bash
# Direct Distillation of FLUX.1-dev to four steps: a LoRA.  No recipe was published for it: Qwen-Image's.
#
#   bash scripts/single_node/direct_distill_flux.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"
# shellcheck source=scripts/direct.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../direct.sh"

every_method
flux 4
direct pairs_flux
lora
#       flag          published  tiny world
setting exp-name      direct_distill_flux
launch "$@"
