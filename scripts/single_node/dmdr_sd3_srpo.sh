#!/usr/bin/env bash
# Four-step SD3-medium, stage 2: distribution matching and semantic-relative rewards (SRPO), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sd3_srpo.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

sd3 # these rows come first
srpo cold_start_sd3 100
#       flag               published   tiny world
setting exp-name           dmdr_sd3_srpo
setting batch-size         4           32
setting learning-rate-gen  5e-7        2e-4
setting learning-rate-gui  2e-7        1e-3
setting max-train-steps    2301        150
launch "$@"
