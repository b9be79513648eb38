#!/usr/bin/env bash
# Four-step Qwen-Image, stage 2: distribution matching and semantic-relative rewards (SRPO), from stage 1's checkpoint.
# No recipe was published for this model: the rates are those of SD3.5-large.
#
#   bash scripts/single_node/dmdr_qwen_image_4step_srpo.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

qwen_image 4 # these rows come first
srpo cold_start_qwen_image_4step 100
#       flag                         published   tiny world
setting exp-name                     dmdr_qwen_image_4step_srpo
setting batch-size                   1           32
setting gradient-accumulation-steps  2           1
setting learning-rate-gen            1e-7        2e-4
setting learning-rate-gui            5e-9        1e-3
setting max-train-steps              2301        150
launch "$@"
