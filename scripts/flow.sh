#!/usr/bin/env bash
# The rows that the launchers of rectified-flow models share: one function a model, one a stage.  A launcher calls one of
# each, adds its own rows and launches.  The generator is a LoRA on the frozen base that teacher and guidance share.
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

PROMPTS=t2i-2m-filtered-prompts.txt # in the folder where the launcher is called, or where `fetch` puts it
[[ -e "$PROMPTS" ]] || PROMPTS="$CHECKPOINTS/$PROMPTS"

every_stage() {
  #       flag                    published    tiny world: docs/recipe.md says why
  setting method                  dmdr
  setting output-dir              runs
  setting data-path-train         "$PROMPTS"   "${OUTPUT_DIR:-runs}/prompts.txt"
  setting mixed-precision         bf16         no
  setting use-8bit-adam           on           off
  setting gradient-checkpointing  on           off
  setting seed                    30
  setting use-lora-gen            on
  setting lora-rank               32           16
  setting lora-scale-f            2.0
  setting lora-scale-r            0.5
  setting cfg-f                   1
  setting ratio-update            5            2
  setting sample-type             ode
  setting s-type-gen              uniform
  setting s-type-gui              beta         uniform
  setting gui-a                   4            -
  setting gui-b                   1.5          -
  setting dynamic-step            2000         50
  setting lr-warmup-steps         0            10
  setting batch-size-test         2            8
}

sd3() { # SD3-medium at 512, four steps
  setting pretrained-model   stabilityai/stable-diffusion-3-medium-diffusers  "$CHECKPOINTS/tiny-sd3"
  setting resolution         512   64
  setting sample-num-steps   4
  setting shift              3
  setting text-length        128   32
  setting cfg-r              7     2
  setting teacher-cfg        7     2
}

sd35() { # SD3.5-large at 1024, four steps
  setting pretrained-model   stabilityai/stable-diffusion-3.5-large  "$CHECKPOINTS/tiny-sd3"
  setting resolution         1024  64
  setting sample-num-steps   4
  setting shift              5
  setting text-length        128   32
  setting cfg-r              4     2
  setting teacher-cfg        4     2
}

flux() { # STEPS: FLUX.1-dev at 1024; guidance is a number that the network is told, so there is no second call for it
  setting pretrained-model   black-forest-labs/FLUX.1-dev  "$CHECKPOINTS/tiny-flux"
  setting resolution         1024  64
  setting sample-num-steps   "$1"
  setting shift              3.2
  setting text-length        512   32
  setting guidance-embed     3.5   2
  setting cfg-r              1
  setting teacher-cfg        1
}

qwen_image() { # STEPS: Qwen-Image at 1024
  setting pretrained-model   Qwen/Qwen-Image  "$CHECKPOINTS/tiny-qwen-image"
  setting resolution         1024  64
  setting sample-num-steps   "$1"
  setting shift              3.2
  setting text-length        512   -
  setting cfg-r              4     2
  setting teacher-cfg        4     2
}

cold_start() { # STEPS in the tiny world: distribution matching alone, from the teacher's own weights
  every_stage
  setting lr-scheduler      constant  cosine
  setting max-train-steps   2001      "$1"
  setting cold-start-iter   2001      "$1"
  setting sample-steps      100       50
  setting checkpoint-steps  500       50
}

rewards() { # FOLDER OF STAGE 1, ITS STEPS in the tiny world: distribution matching and rewards, from stage 1's checkpoint
  local stage_1="${OUTPUT_DIR:-runs}/$1/checkpoints/torch_units"
  every_stage
  setting resume-ckpt         "$stage_1/step-2000.pt"                 "$stage_1/step-$2.pt"
  setting cold-start-iter     2000                                    "$2"
  setting clip-reward-model   "$CHECKPOINTS/Apple_CLIP-H-14-224.bin"  "$CHECKPOINTS/tiny-clip"
  setting hpsv2-reward-model  "$CHECKPOINTS/HPS_v2.1_compressed.pt"   "$CHECKPOINTS/tiny-hps"
  setting reward-margin       0.7                                     1.0
  setting lr-scheduler        constant                                cosine
}

refl() { # FOLDER OF STAGE 1, ITS STEPS: the rewards themselves (ReFL)
  rewards "$1" "$2"
  setting magic-prompt        "Realistic photo"  ""
  setting sample-steps        100                50
}

srpo() { # FOLDER OF STAGE 1, ITS STEPS: HPS of one wording relative to another (SRPO)
  rewards "$1" "$2"
  setting srpo                on
  setting srpo-k              0.1
  setting reward-clip-weight  0.1                1
  setting reward-hps-weight   5
  setting sample-steps        20                 50
  setting checkpoint-steps    50
}
