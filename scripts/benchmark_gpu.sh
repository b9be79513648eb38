#!/usr/bin/env bash
# What docs/performance.md wants to know of a GPU, in one call of under ten minutes: SDXL's full generator beside the published
# schedule, LoRA generators of SDXL, SD3.5-large, FLUX.1 and Qwen-Image, random weights in the true shapes, 1024 px, bf16.
# Each row has a process and a time limit of its own; one that does not fit into memory says so, and the next is measured.
# Writes JSON, a table (.md) and a picture (.png, .pdf) into $WORK.
#
#   bash scripts/benchmark_gpu.sh           needs a CUDA device
#   SMALL=1 bash scripts/benchmark_gpu.sh   the same rows with the tiny models at 64 px, on what there is
#
# BUDGET_S (570): seconds for everything; rows that there is no time left for say so.
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
work="${WORK:-$(pwd -P)/runs/benchmark_gpu}"
out="$work/benchmark_gpu.json"
mkdir -p -- "$work"
rm -f -- "$out"
"$PYTHON" -m shapes.scenes prompts --split train --count 100 --seed 1 --out "$work/prompts.txt"
common=(--data-path-train "$work/prompts.txt" --out "$out" --append --steps 1 --sample-num-steps 4)
if [[ "${SMALL:-0}" == 1 ]]; then
  models="$SETUP_ROOT/checkpoints"
  sdxl="$models/tiny-sdxl" sd35="$models/tiny-sd3" flux="$models/tiny-flux" qwen="$models/tiny-qwen-image"
  common+=(--resolution 64 --mixed-precision no --lora-rank 16)
  rewards=(--clip-reward-model "$models/tiny-clip" --hpsv2-reward-model "$models/tiny-hps")
else
  sdxl=sdxl sd35=sd35_large flux=flux_dev qwen=qwen_image
  common+=(--resolution 1024 --mixed-precision bf16 --lora-rank 32)
  rewards=(--random-rewards "$work/random_vit_h_14.safetensors")
fi

budget="${BUDGET_S:-570}"

rows() { # SECONDS FLAGS...: at most so long a row, and no longer than what is left
  local left=$((budget - SECONDS)) limit="$1"
  if ((left < limit)) || [[ "${SMALL:-0}" == 1 ]]; then limit=$((left > 1 ? left : 1)); fi
  "$PYTHON" -m train_t2i benchmark "${common[@]}" --row-limit-s "$limit" "${@:2}"
}

rows 70 --models "$sdxl" --layouts paired --batch-size 4 --schedules published,ours --checkpointing off
rows 70 --models "$sdxl" --layouts paired --batch-size 4 --checkpointing on
rows 90 --models "$sdxl" --layouts paired --batch-size 8 --checkpointing on
rows 50 --models "$sdxl" --layouts shared --batch-size 1 --checkpointing on
rows 60 --models "$sd35" --layouts shared --batch-size 1 --checkpointing on
rows 90 --models "$flux" --layouts shared --batch-size 1 --checkpointing on "${rewards[@]}"
rows 150 --models "$qwen" --layouts shared --batch-size 1 --checkpointing on "${rewards[@]}"
cat -- "${out%.json}.md"
