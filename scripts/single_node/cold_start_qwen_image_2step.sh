#!/usr/bin/env bash
# Two-step Qwen-Image, stage 1: distribution matching with both dynamic strategies.
# No recipe was published for this model: the rates are those of SD3.5-large.
#
#   bash scripts/single_node/cold_start_qwen_image_2step.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

qwen_image 2 # these rows come first
cold_start 200
#       flag                         published   tiny world
setting exp-name                     cold_start_qwen_image_2step
setting batch-size                   1           32
setting gradient-accumulation-steps  4           1
setting learning-rate-gen            1e-6        5e-4
setting learning-rate-gui            2e-8        1e-3
launch "$@"
