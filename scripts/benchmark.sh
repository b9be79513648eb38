#!/usr/bin/env bash
# Seconds and memory of a DMDR step of the tiny models: prints rows, writes JSON, a table and a picture.
#
#   bash scripts/benchmark.sh                  every layout, with and without gradient checkpointing
#   bash scripts/benchmark.sh --layouts shared --mixed-precision no,bf16 --schedules ours,published --checkpointing off
#   bash scripts/benchmark.sh --models checkpoints/tiny-sdxl,checkpoints/tiny-flux --layouts shared
#   bash scripts/benchmark.sh --num-processes 2 --backends ddp,fsdp2 --layouts paired
#   bash scripts/benchmark.sh --part rewards   what comes after the network alone: decoding, scoring, the gradient
#   bash scripts/benchmark.sh --part published one step as the published trainer schedules it, and as ours
# Full sizes on a GPU: scripts/benchmark_gpu.sh.
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
work="${WORK:-$(pwd -P)/runs/benchmark}"
mkdir -p -- "$work"
"$PYTHON" -m shapes.scenes prompts --split train --count 1000 --seed 1 --out "$work/prompts.txt"
models="$SETUP_ROOT/checkpoints"
flags=(--data-path-train "$work/prompts.txt" --out "$work/benchmark.json" --pretrained-model "$models/tiny-sdxl"
  --clip-reward-model "$models/tiny-clip" --hpsv2-reward-model "$models/tiny-hps" --resolution 64 --batch-size 32
  --mixed-precision no)
[[ " $* " =~ \ --models[=\ ] ]] || flags+=(--tiny-vae "$models/tiny-taesd") # SDXL's: other families decode with their own
[[ " $* " =~ \ --part[=\ ]rewards\  ]] || flags+=(--lora-rank 16) # beside rewards alone it would be refused
exec "$PYTHON" -m train_t2i benchmark "${flags[@]}" "$@"
