#!/usr/bin/env bash
# Four-step SD3.5-large, stage 2: distribution matching and rewards (ReFL), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sd35_refl.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

sd35 # these rows come first
refl cold_start_sd35 100
#       flag                published   tiny world
setting exp-name            dmdr_sd35_refl
setting batch-size          2           32
setting reward-batch-size   1           -
setting learning-rate-gen   1e-7        2e-4
setting learning-rate-gui   5e-9        1e-3
setting reward-clip-weight  0.1         1
setting reward-hps-weight   0.1         1
setting max-train-steps     3001        300
setting checkpoint-steps    250         50
launch "$@"
