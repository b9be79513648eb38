#!/usr/bin/env bash
# Four-step SDXL, stage 2: distribution matching and rewards (ReFL), from stage 1's checkpoint.
#
#   bash scripts/single_node/dmdr_sdxl_4step_refl.sh [FLAGS]     TINY=1 for the tiny world
# shellcheck source=scripts/sdxl.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl.sh"

#       flag                published                                        tiny world
setting method              dmdr
setting exp-name            dmdr_sdxl_4step_refl
setting data-path-train     t2i-2m-filtered-prompts.txt                      runs/prompts.txt
setting resume-ckpt         runs/cold_start_sdxl_4step/checkpoints/torch_units/step-2000.pt \
                            runs/cold_start_sdxl_4step/checkpoints/torch_units/step-150.pt
setting sample-num-steps    4
setting lora-rank           32                                               16
setting lora-scale-f        2.0
setting lora-scale-r        0.5
setting cfg-r               7                                                3
setting cfg-f               1
setting ratio-update        5
setting dynamic-step        2000                                             100
setting s-type-gen          uniform
setting s-type-gui          beta
setting gui-a               4
setting gui-b               1.5
setting batch-size          4                                                32
setting learning-rate-gen   5e-7                                             5e-5
setting learning-rate-gui   2e-7                                             5e-4
setting max-train-steps     4000                                             270
setting cold-start-iter     2000                                             150
setting clip-reward-model   "$CHECKPOINTS/Apple_CLIP-H-14-224.bin"           "$CHECKPOINTS/tiny-clip"
setting hpsv2-reward-model  "$CHECKPOINTS/HPS_v2.1_compressed.pt"            "$CHECKPOINTS/tiny-hps"
setting reward-clip-weight  0.3
setting reward-hps-weight   0.3
setting reward-margin       0.7                                              1.0
setting magic-prompt        "Realistic photo"                                ""
setting sample-steps        100                                              40
setting checkpoint-steps    200                                              40
setting batch-size-test     2                                                8
launch "$@"
