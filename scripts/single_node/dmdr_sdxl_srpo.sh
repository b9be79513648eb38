#!/usr/bin/env bash
# One-step SDXL, stage 2: distribution matching and semantic-relative rewards (SRPO), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sdxl_srpo.sh [FLAGS]     TINY=1 for the tiny world
# shellcheck source=scripts/sdxl_rewards.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl_rewards.sh"

one_step_stage_2 srpo
launch "$@"
