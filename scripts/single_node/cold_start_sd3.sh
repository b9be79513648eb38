#!/usr/bin/env bash
# Four-step SD3-medium, stage 1: distribution matching with both dynamic strategies.
#
#   bash scripts/single_node/cold_start_sd3.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

sd3 # these rows come first
cold_start 100
#       flag               published   tiny world
setting exp-name           cold_start_sd3
setting batch-size         8           32
setting learning-rate-gen  1e-6        5e-4
setting learning-rate-gui  5e-7        1e-3
launch "$@"
