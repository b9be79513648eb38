#!/usr/bin/env bash
# Four-step SDXL, stage 2: distribution matching and rewards (ReFL), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sdxl_4step_refl.sh [FLAGS]     TINY=1 for the tiny world
# shellcheck source=scripts/sdxl_rewards.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl_rewards.sh"

STAGE_1="${OUTPUT_DIR:-runs}/cold_start_sdxl_4step/checkpoints/torch_units"

four_steps # these rows and those of the sourced file come first
refl
#       flag               published                 tiny world
setting exp-name           dmdr_sdxl_4step_refl
setting resume-ckpt        "$STAGE_1/step-2000.pt"   "$STAGE_1/step-100.pt"
setting learning-rate-gen  5e-7                      5e-5
setting lr-scheduler       constant                  cosine
setting learning-rate-gui  2e-7                      1e-3
setting cold-start-iter    2000                      100
launch "$@"
