#!/usr/bin/env bash
# Seconds and memory of a DMDR step in every layout, with and without gradient checkpointing; prints and writes JSON.
#
#   bash scripts/benchmark.sh                  the tiny world
#   bash scripts/benchmark.sh --part rewards   what comes after the network alone: decoding, scoring, the gradient
#   bash scripts/benchmark.sh --size sdxl      random full-size SDXL and ViT-H-14 towers; needs a CUDA device
#   bash scripts/benchmark.sh --part published one step as the published trainer schedules it, and as ours
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
work="${WORK:-$(pwd -P)/runs/benchmark}"
mkdir -p -- "$work"
"$PYTHON" -m shapes.scenes prompts --split train --count 1000 --seed 1 --out "$work/prompts.txt"
flags=(--data-path-train "$work/prompts.txt" --out "$work/benchmark.json")
if [[ " $* " == *" sdxl "* || " $* " == *"=sdxl "* ]]; then
  flags+=(--batch-size 4 --resolution 1024)
  of_steps=(--layouts "shared,paired")
else
  models="$SETUP_ROOT/checkpoints"
  flags+=(--pretrained-model "$models/tiny-sdxl" --tiny-vae "$models/tiny-taesd" --clip-reward-model "$models/tiny-clip"
    --hpsv2-reward-model "$models/tiny-hps" --resolution 64 --batch-size 32 --mixed-precision no)
  of_steps=(--lora-rank 16)
fi
[[ " $* " =~ \ --part[=\ ]rewards\  ]] || flags+=("${of_steps[@]}") # beside rewards alone they would be refused
exec "$PYTHON" -m train_t2i benchmark "${flags[@]}" "$@"
