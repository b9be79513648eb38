#!/usr/bin/env bash
# The rows that SDXL's launchers with rewards share, after those of DMDR.
# shellcheck source=scripts/sdxl_dmdr.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/sdxl_dmdr.sh"

#       flag                published                               tiny world
setting clip-reward-model   "$CHECKPOINTS/Apple_CLIP-H-14-224.bin"  "$CHECKPOINTS/tiny-clip"
setting hpsv2-reward-model  "$CHECKPOINTS/HPS_v2.1_compressed.pt"   "$CHECKPOINTS/tiny-hps"
setting tiny-vae            madebyollin/taesdxl                     -
setting reward-clip-weight  0.3                                     1
setting reward-hps-weight   0.3                                     1
setting reward-margin       0.7                                     1.0
setting batch-size          4                                       32
setting max-train-steps     4000                                    300
setting sample-steps        100                                     50
setting checkpoint-steps    200                                     50

refl() { # the rewards themselves
  setting magic-prompt        "Realistic photo"                       ""
}

srpo() { # HPS of one wording relative to another; nobody published it for SDXL: the weights are those of SD3's
  setting srpo                on
  setting srpo-k              0.1
  setting reward-clip-weight  0.1                                     1
  setting reward-hps-weight   5
}

one_step_stage_2() { # REWARDS: of refl or srpo, from stage 1's checkpoint
  local stage_1="${OUTPUT_DIR:-runs}/cold_start_sdxl/checkpoints/torch_units"
  one_step
  "$1"
  setting exp-name            "dmdr_sdxl_$1"
  setting resume-ckpt         "$stage_1/step-3000.pt"                 "$stage_1/step-100.pt"
  setting learning-rate-gen   5e-8                                    5e-5
  setting lr-scheduler        constant                                cosine
  setting learning-rate-gui   5e-8                                    1e-3
  setting cfg-r               7                                       "$TINY_GUIDANCE"
  setting cold-start-iter     3000                                    100
}
