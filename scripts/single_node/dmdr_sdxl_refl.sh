#!/usr/bin/env bash
# One-step SDXL, stage 2: distribution matching and rewards (ReFL), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sdxl_refl.sh [FLAGS]     TINY=1 for the tiny world
# shellcheck source=scripts/sdxl_rewards.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl_rewards.sh"

one_step_stage_2 refl
launch "$@"
