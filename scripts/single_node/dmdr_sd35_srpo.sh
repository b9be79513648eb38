#!/usr/bin/env bash
# Four-step SD3.5-large, stage 2: distribution matching and semantic-relative rewards (SRPO), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sd35_srpo.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

sd35 # these rows come first
srpo cold_start_sd35 100
#       flag               published   tiny world
setting exp-name           dmdr_sd35_srpo
setting batch-size         2           32
setting reward-batch-size  1           -
setting learning-rate-gen  1e-7        2e-4
setting learning-rate-gui  5e-9        1e-3
setting max-train-steps    2301        150
launch "$@"
