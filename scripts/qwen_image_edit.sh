#!/usr/bin/env bash
# The rows that the launchers of supervised Qwen-Image and Qwen-Image-Edit share: all weights, on image-text pairs.  The
# settings are VideoX-Fun's.  A launcher names a model, then this recipe, then itself; BACKEND=ddp|fsdp2|zero2|zero3.
#
# The data is a table of rows (docs/supervised.md) beside its images: DATA_PATH_TRAIN=FILE, TRAIN_DATA_DIR=FOLDER.
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

qwen_image() {
  setting pretrained-model  Qwen/Qwen-Image  "$CHECKPOINTS/tiny-qwen-image"
  setting data-path-train   datasets/internal_datasets/metadata.json  "${OUTPUT_DIR:-runs}/images/metadata.csv"
  setting teacher-cfg       4                "$TINY_QWEN_IMAGE_GUIDANCE"
}

qwen_image_edit() {
  setting pretrained-model  Qwen/Qwen-Image-Edit  "$CHECKPOINTS/tiny-qwen-image-edit"
  setting data-path-train   datasets/internal_datasets/metadata.json  "${OUTPUT_DIR:-runs}/edits/metadata.json"
  setting source-size       1024             64
  setting teacher-cfg       4                "$TINY_GUIDANCE"
}

supervised() {
  #       flag                         published             tiny world
  setting method                       sft
  setting output-dir                   runs
  setting train-data-dir               datasets/internal_datasets  -
  setting resolution                   1024                  64
  setting shift                        0 # the model's own
  setting enable-bucket                on                    off
  setting batch-size                   1                     32
  setting gradient-accumulation-steps  1
  setting num-workers                  8                     0
  setting num-train-epochs             100                   -
  setting max-train-steps              -                     300
  setting learning-rate-gen            2e-5                  2e-4
  setting lr-scheduler                 constant_with_warmup
  setting lr-warmup-steps              100                   10
  setting adam-weight-decay            3e-2
  setting adam-epsilon                 1e-10
  setting max-grad-norm                0.05
  setting vae-mini-batch               1                     -
  setting uniform-sampling             on
  setting mixed-precision              bf16                  no
  setting gradient-checkpointing       on                    off
  setting seed                         42
  setting batch-size-test              2                     8
  setting teacher-num-steps            50                    25
  setting sample-steps                 500                   100
  setting checkpoint-steps             50                    100
}
