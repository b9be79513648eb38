#!/usr/bin/env bash
# The rows that all SDXL launchers share: the model and what every stage has in common.  A stage's rows come after.
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

#       flag                    published                                 tiny world
setting pretrained-model        stabilityai/stable-diffusion-xl-base-1.0  "$CHECKPOINTS/tiny-sdxl"
setting resolution              1024                                      64
setting mixed-precision         fp16                                      no
setting use-8bit-adam           on                                        off
setting gradient-checkpointing  on                                        off
setting output-dir              runs
setting seed                    30
