#!/usr/bin/env bash
# The rows that the launchers of Direct Distillation share, after those of a model.  The settings of Qwen-Image are
# DiffSynth-Studio's; its teacher's results come first:
#
#   python -m train_t2i pairs --pretrained-model Qwen/Qwen-Image --student-num-steps 4 --num-inference-steps 40 --cfg-scale 4 \
#     --resolution 1328 --mixed-precision bf16 --images --out runs/pairs_qwen_image
#
# or a table of DiffSynth-Studio's own: DATA_PATH_TRAIN=metadata.csv, whose images lie beside it.
direct() { # NAME OF THE PAIRS: the student's whole sampler against the teacher's results
  setting method                  direct
  setting data-path-train         "runs/$1"  "${OUTPUT_DIR:-runs}/$1"
  setting sample-type             ode
  setting batch-size              1          32
  setting lr-scheduler            constant   cosine
  setting lr-warmup-steps         0          20
  setting max-train-steps         2000       150
  setting sample-steps            100
  setting checkpoint-steps        500        100
}

lora() { # DiffSynth-Studio's: rank 32, factor 1
  setting use-lora-gen            on
  setting lora-rank               32
  setting learning-rate-gen       1e-4       1e-3
}

full() { # all weights
  setting learning-rate-gen       1e-5       2e-4
}
