#!/usr/bin/env bash
# One-step SDXL, stage 2: distribution matching and semantic-relative rewards (SRPO), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sdxl_srpo.sh [FLAGS]     TINY=1 for the tiny world
# shellcheck source=scripts/sdxl_rewards.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl_rewards.sh"

STAGE_1="${OUTPUT_DIR:-runs}/cold_start_sdxl/checkpoints/torch_units"

one_step # these rows and those of the sourced file come first
srpo
#       flag               published                 tiny world
setting exp-name           dmdr_sdxl_srpo
setting resume-ckpt        "$STAGE_1/step-3000.pt"   "$STAGE_1/step-100.pt"
setting learning-rate-gen  5e-8                      5e-5
setting lr-scheduler       constant                  cosine
setting learning-rate-gui  5e-8                      1e-3
setting cfg-r              7                         "$TINY_GUIDANCE"
setting cold-start-iter    3000                      100
launch "$@"
