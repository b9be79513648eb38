#!/usr/bin/env bash
# The rows that the launchers of rectified-flow models share: one function a model, one a stage.  A launcher calls one of
# each, adds its own rows and launches.  The generator is a LoRA on the frozen base that teacher and guidance share.
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

PROMPTS=t2i-2m-filtered-prompts.txt # in the folder where the launcher is called, or where `fetch` puts it
[[ -e "$PROMPTS" ]] || PROMPTS="$CHECKPOINTS/$PROMPTS"

every_method() {
  #       flag                    published    tiny world: docs/recipe.md says why
  setting output-dir              runs
  setting mixed-precision         bf16         no
  setting use-8bit-adam           on           off
  setting gradient-checkpointing  on           off
  setting seed                    30
  setting batch-size-test         2            8
}

every_stage() { # of DMDR
  every_method
  setting method                  dmdr
  setting data-path-train         "$PROMPTS"   "${OUTPUT_DIR:-runs}/prompts.txt"
  setting use-lora-gen            on
  setting lora-rank               32           16
  setting lora-scale-f            2.0
  setting lora-scale-r            0.5
  setting cfg-r                   "$GUIDANCE"  "$TEACHER_GUIDANCE"
  setting cfg-f                   1
  setting ratio-update            5            2
  setting sample-type             ode
  setting s-type-gen              uniform
  setting s-type-gui              beta         uniform
  setting gui-a                   4            -
  setting gui-b                   1.5          -
  setting dynamic-step            2000         50
  setting lr-warmup-steps         0            10
}

# GUIDANCE is the published one of a model's teacher, TEACHER_GUIDANCE that of its tiny sibling

sd3() { # SD3-medium at 512, four steps
  GUIDANCE=7 TEACHER_GUIDANCE="$TINY_GUIDANCE"
  setting pretrained-model   stabilityai/stable-diffusion-3-medium-diffusers  "$CHECKPOINTS/tiny-sd3"
  setting resolution         512   64
  setting sample-num-steps   4
  setting shift              3
  setting text-length        128   32
}

sd35() { # SD3.5-large at 1024, four steps
  GUIDANCE=4 TEACHER_GUIDANCE="$TINY_GUIDANCE"
  setting pretrained-model   stabilityai/stable-diffusion-3.5-large  "$CHECKPOINTS/tiny-sd3"
  setting resolution         1024  64
  setting sample-num-steps   4
  setting shift              5
  setting text-length        128   32
}

flux() { # STEPS: FLUX.1-dev at 1024; guidance is a number that the network is told, so there is no second call for it
  GUIDANCE=1 TEACHER_GUIDANCE=1
  setting pretrained-model   black-forest-labs/FLUX.1-dev  "$CHECKPOINTS/tiny-flux"
  setting resolution         1024  64
  setting sample-num-steps   "$1"
  setting shift              3.2
  setting text-length        512   32
  setting guidance-embed     3.5   2
}

qwen_image() { # STEPS: Qwen-Image at 1024
  GUIDANCE=4 TEACHER_GUIDANCE="$TINY_QWEN_IMAGE_GUIDANCE"
  setting pretrained-model   Qwen/Qwen-Image  "$CHECKPOINTS/tiny-qwen-image"
  setting resolution         1024  64
  setting sample-num-steps   "$1"
  setting shift              3.2
  setting text-length        512   -
}

qwen_image_edit() { # STEPS: Qwen-Image-Edit-2509 at 1024; the data is a table of edits (docs/supervised.md), whose targets nobody reads
  GUIDANCE=4 TEACHER_GUIDANCE="$TINY_GUIDANCE"
  setting pretrained-model   Qwen/Qwen-Image-Edit-2509  "$CHECKPOINTS/tiny-qwen-image-edit"
  setting resolution         1024  64
  setting source-size        1024  64
  setting source-seen-size   384   64
  setting sample-num-steps   "$1"
  setting shift              3.2
}

edits() { # after the rows of a stage
  setting data-path-train    datasets/internal_datasets/metadata.json  "${OUTPUT_DIR:-runs}/edits/metadata.json"
  setting num-workers        4     0
}

teacher_images() { # of the sample sheets, for methods that have a teacher at hand
  setting teacher-cfg  "$GUIDANCE"  "$TEACHER_GUIDANCE"
}

cold_start() { # STEPS in the tiny world: distribution matching alone, from the teacher's own weights
  every_stage
  teacher_images
  setting lr-scheduler      constant  cosine
  setting max-train-steps   2001      "$1"
  setting cold-start-iter   2001      "$1"
  setting sample-steps      100       50
  setting checkpoint-steps  500       50
}

rewards() { # FOLDER OF STAGE 1, ITS STEPS in the tiny world: distribution matching and rewards, from stage 1's checkpoint
  local stage_1="${OUTPUT_DIR:-runs}/$1/checkpoints/torch_units"
  every_stage
  teacher_images
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

arcflow() { # STEPS OF MIXING, ALL STEPS: ArcFlow's published settings for both models
  every_method
  teacher_images
  setting method                       arcflow
  setting data-path-train              "$PROMPTS"   "${OUTPUT_DIR:-runs}/prompts.txt"
  setting use-lora-gen                 on
  setting lora-rank                    256          32
  setting distill-cfg                  "$GUIDANCE"  "$TEACHER_GUIDANCE"
  setting batch-size                   4            32
  setting learning-rate-gen            1e-4         1e-3
  setting adam-beta2                   0.95
  setting adam-weight-decay            0
  setting max-grad-norm                50
  setting lr-scheduler                 constant     cosine
  setting lr-warmup-steps              100          10
  setting mixing-steps                 "$1"         50
  setting ema-start                    100          50
  setting max-train-steps              "$2"         300
  setting sample-steps                 500          100
  setting checkpoint-steps             500          50
}
