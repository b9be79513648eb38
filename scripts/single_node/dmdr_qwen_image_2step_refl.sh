#!/usr/bin/env bash
# Two-step Qwen-Image, stage 2: distribution matching and rewards (ReFL), from stage 1's checkpoint.
# No recipe was published for this model: the rates are those of SD3.5-large.
#
#   bash scripts/single_node/dmdr_qwen_image_2step_refl.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

qwen_image 2 # these rows come first
refl cold_start_qwen_image_2step 200
#       flag                         published   tiny world
setting exp-name                     dmdr_qwen_image_2step_refl
setting batch-size                   1           32
setting gradient-accumulation-steps  2           1
setting learning-rate-gen            1e-7        2e-4
setting learning-rate-gui            5e-9        1e-3
setting reward-clip-weight           0.1         1
setting reward-hps-weight            0.1         1
setting max-train-steps              3001        500
setting checkpoint-steps             250         50
launch "$@"
