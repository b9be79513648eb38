#!/usr/bin/env bash
# Four-step SDXL, stage 1: distribution matching with both dynamic strategies, from the teacher's own weights.
#
#   bash scripts/single_node/cold_start_sdxl_4step.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/sdxl_dmdr.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl_dmdr.sh"

four_steps # these rows and those of the sourced file come first
#       flag               published              tiny world
setting exp-name           cold_start_sdxl_4step
setting batch-size         8                      32
setting learning-rate-gen  1e-6                   1e-4
setting lr-scheduler       constant               cosine
setting learning-rate-gui  5e-7                   1e-3
setting max-train-steps    2000                   100
setting cold-start-iter    2000                   100
setting sample-steps       100                    50
setting checkpoint-steps   500                    50
launch "$@"
