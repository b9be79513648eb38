#!/usr/bin/env bash
# One-step SDXL, stage 1: distribution matching alone, from an ODE initialisation.
#
#   bash scripts/single_node/cold_start_sdxl.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/sdxl_dmdr.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl_dmdr.sh"

STAGE_0="${OUTPUT_DIR:-runs}/ode_init_sdxl/checkpoints/torch_units"
ODE_2K=sdxl_lr1e-5_8node_ode_pretraining_10k_cond399_checkpoint_model_002000.bin # DMD2's; ours: an ode run's step-N.pt

one_step # these rows and those of the sourced file come first
#       flag                  published               tiny world
setting exp-name              cold_start_sdxl
setting xl-ode-pretrain-path  "$CHECKPOINTS/$ODE_2K"  "$STAGE_0/step-350.pt"
setting batch-size            8                       32
setting learning-rate-gen     1e-7                    2e-5
setting learning-rate-gui     1e-7                    1e-3
setting max-train-steps       3000                    100
setting cold-start-iter       3000                    100
setting sample-steps          100                     50
setting checkpoint-steps      500                     50
launch "$@"
