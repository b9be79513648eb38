#!/usr/bin/env bash
# Four-step SD3-medium, stage 2: distribution matching and rewards (ReFL), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sd3_refl.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

sd3 # these rows come first
refl cold_start_sd3 100
#       flag                published   tiny world
setting exp-name            dmdr_sd3_refl
setting batch-size          4           32
setting learning-rate-gen   5e-7        2e-4
setting learning-rate-gui   2e-7        1e-3
setting reward-clip-weight  0.3         2
setting reward-hps-weight   0.3         1
setting max-train-steps     4001        600
setting checkpoint-steps    500         50
launch "$@"
