#!/usr/bin/env bash
# What the tiny world trains on.  Expects PYTHON and SETUP_ROOT (setup.sh).

TINY_GUIDANCE=2 # the best of the tiny teacher (docs/recipe.md)

tiny_prompts() { # FILE: complete or absent
  mkdir -p -- "$(dirname -- "$1")"
  "$PYTHON" -m shapes.scenes prompts --split train --count 8000 --seed 1 --out "$1.part"
  mv -- "$1.part" "$1"
}

tiny_pairs() { # FOLDER PROMPTS COUNT [MODEL]: (noise, prompt, teacher latent); begun before, it goes on
  local model="${4:-sdxl}"
  local -a told=(--cfg-scale "$TINY_GUIDANCE")
  case "$model" in
    sd3) told+=(--text-length 32) ;;
    flux) told=(--cfg-scale 1 --guidance-embed "$TINY_GUIDANCE" --text-length 32) ;;
  esac
  "$PYTHON" -m train_t2i pairs --out "$1" --pretrained-model "$SETUP_ROOT/checkpoints/tiny-${model//_/-}" --count "$3" \
    --data-path-train "$2" --num-inference-steps 25 --resolution 64 --mixed-precision no --batch-size 64 "${told[@]}"
}
