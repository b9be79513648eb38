#!/usr/bin/env bash
# Four-step SD3.5-large, stage 1: distribution matching with both dynamic strategies.
#
#   bash scripts/single_node/cold_start_sd35.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

sd35 # these rows come first
cold_start 100
#       flag               published   tiny world
setting exp-name           cold_start_sd35
setting batch-size         4           32
setting learning-rate-gen  1e-6        5e-4
setting learning-rate-gui  2e-8        1e-3
launch "$@"
