#!/usr/bin/env bash
# One-step SDXL, stage 1: distribution matching alone, from an ODE initialisation.
#
#   bash scripts/single_node/cold_start_sdxl.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/sdxl.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl.sh"

ODE_2K=sdxl_lr1e-5_8node_ode_pretraining_10k_cond399_checkpoint_model_002000.bin # DMD2's; ours: an ode run's step-N.pt

#       flag                  published                      tiny world
setting method                dmdr
setting exp-name              cold_start_sdxl
setting data-path-train       t2i-2m-filtered-prompts.txt    runs/prompts.txt
setting xl-ode-pretrain-path  "$CHECKPOINTS/$ODE_2K"         runs/ode_init_sdxl/checkpoints/torch_units/step-700.pt
setting sample-num-steps      1
setting lora-rank             32                             16
setting lora-scale-f          2.0
setting lora-scale-r          0.5
setting cfg-r                 7                              3
setting cfg-f                 1
setting ratio-update          5
setting batch-size            8                              32
setting learning-rate-gen     1e-7                           1e-4
setting learning-rate-gui     1e-7                           5e-4
setting max-train-steps       3000                           150
setting cold-start-iter       3000                           150
setting sample-steps          100                            50
setting checkpoint-steps      500                            50
setting batch-size-test       2                              8
launch "$@"
