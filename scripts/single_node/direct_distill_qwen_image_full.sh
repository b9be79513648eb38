#!/usr/bin/env bash
# Direct Distillation of Qwen-Image to four steps: all weights; one GPU holds no 20 B: BACKEND=fsdp2 or zero3.
#
#   bash scripts/single_node/direct_distill_qwen_image_full.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"
# shellcheck source=scripts/direct.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../direct.sh"

every_method
qwen_image 4
direct pairs_qwen_image
full
#       flag          published  tiny world
setting exp-name      direct_distill_qwen_image_full
setting resolution    1328       64
setting shift         0 # the model's own at this size, as its pipeline takes it
launch "$@"
