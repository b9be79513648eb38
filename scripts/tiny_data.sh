#!/usr/bin/env bash
# What the tiny world trains on.  Expects PYTHON and SETUP_ROOT (setup.sh).

TINY_GUIDANCE=2 TINY_QWEN_IMAGE_GUIDANCE=3 # the best of the tiny teachers (docs/recipe.md)

tiny_prompts() { # FILE: complete or absent
  mkdir -p -- "$(dirname -- "$1")"
  "$PYTHON" -m shapes.scenes prompts --split train --count 8000 --seed 1 --out "$1.part"
  mv -- "$1.part" "$1"
}

tiny_images() { # FOLDER: pictures and metadata.csv, complete or absent
  rm -rf -- "$1.part"
  "$PYTHON" -m shapes.scenes render --split train --count 2000 --seed 1 --out "$1.part"
  mv -- "$1.part" "$1"
}

tiny_edits() { # FOLDER: pictures before and after, and metadata.json, complete or absent
  rm -rf -- "$1.part"
  "$PYTHON" -m shapes.edits render --split train --count 4000 --seed 1 --out "$1.part"
  mv -- "$1.part" "$1"
}

tiny_teacher() { # FAMILY: sets TEACHER, the flags that say which model it is and what it is told, and TEACHER_CFG
  TEACHER=(--pretrained-model "$SETUP_ROOT/checkpoints/tiny-${1//_/-}" --resolution 64)
  TEACHER_CFG="$TINY_GUIDANCE"
  case "$1" in
    sd3) TEACHER+=(--text-length 32) ;;
    qwen_image) TEACHER_CFG="$TINY_QWEN_IMAGE_GUIDANCE" ;;
    qwen_image_edit) TEACHER+=(--source-size 64 --source-seen-size 64) ;;
    flux) # guidance is a number that the network is told: no second call for it
      TEACHER+=(--guidance-embed "$TINY_GUIDANCE" --text-length 32)
      TEACHER_CFG=1
      ;;
  esac
}

tiny_pairs() { # FOLDER PROMPTS COUNT [FAMILY [GUIDANCE]]: (noise, prompt, teacher latent), of edits with sources; begun before, it goes on
  tiny_teacher "${4:-sdxl}"
  "$PYTHON" -m train_t2i pairs --out "$1" "${TEACHER[@]}" --cfg-scale "${5:-$TEACHER_CFG}" --count "$3" --data-path-train "$2" \
    --num-inference-steps 25 --mixed-precision no --batch-size 64
}
