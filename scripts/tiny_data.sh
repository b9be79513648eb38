#!/usr/bin/env bash
# What the tiny world trains on.  Expects PYTHON and SETUP_ROOT (setup.sh).

TINY_GUIDANCE=2 # the best of the tiny teacher (docs/recipe.md)

tiny_prompts() { # FILE: complete or absent
  mkdir -p -- "$(dirname -- "$1")"
  "$PYTHON" -m shapes.scenes prompts --split train --count 8000 --seed 1 --out "$1.part"
  mv -- "$1.part" "$1"
}

tiny_pairs() { # FOLDER PROMPTS COUNT: (noise, prompt, teacher latent); begun before, it goes on
  "$PYTHON" -m train_t2i pairs --out "$1" --pretrained-model "$SETUP_ROOT/checkpoints/tiny-sdxl" --count "$3" \
    --data-path-train "$2" --num-inference-steps 25 --cfg-scale "$TINY_GUIDANCE" --resolution 64 \
    --mixed-precision no --batch-size 64
}
