#!/usr/bin/env bash
# Four-step Qwen-Image-Edit-2509: distribution matching with both dynamic strategies, from instructions and sources alone.
# No recipe was published for this model: the rates are those of SD3.5-large.
#
#   bash scripts/single_node/cold_start_qwen_image_edit_4step.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

qwen_image_edit 4 # these rows come first
cold_start 200
edits
#       flag                         published   tiny world
setting exp-name                     cold_start_qwen_image_edit_4step
setting batch-size                   1           32
setting gradient-accumulation-steps  4           1
setting learning-rate-gen            1e-6        5e-4
setting learning-rate-gui            2e-8        1e-3
launch "$@"
