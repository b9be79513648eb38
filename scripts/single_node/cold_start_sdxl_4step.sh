#!/usr/bin/env bash
# Four-step SDXL, stage 1: distribution matching with both dynamic strategies, from the teacher's own weights.
#
#   bash scripts/single_node/cold_start_sdxl_4step.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/sdxl.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl.sh"

#       flag                published                      tiny world
setting method              dmdr
setting exp-name            cold_start_sdxl_4step
setting data-path-train     t2i-2m-filtered-prompts.txt    runs/prompts.txt
setting sample-num-steps    4
setting lora-rank           32                             16
setting lora-scale-f        2.0
setting lora-scale-r        0.5
setting cfg-r               7                              3
setting cfg-f               1
setting ratio-update        5
setting dynamic-step        2000                           100
setting s-type-gen          uniform
setting s-type-gui          beta
setting gui-a               4
setting gui-b               1.5
setting batch-size          8                              32
setting learning-rate-gen   1e-6                           1e-4
setting learning-rate-gui   5e-7                           5e-4
setting max-train-steps     2000                           150
setting cold-start-iter     2000                           150
setting sample-steps        100                            50
setting checkpoint-steps    500                            50
setting batch-size-test     2                              8
launch "$@"
