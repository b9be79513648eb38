#!/usr/bin/env bash
# One-step SDXL, before stage 1: regression on (noise, prompt, teacher latent) pairs at level 399, as DMD2's initialisation.
# Make the pairs first: python -m train_t2i pairs --data-path-train PROMPTS --out runs/pairs  (TINY=1 makes its own)
#
#   bash scripts/single_node/ode_init_sdxl.sh [FLAGS]      TINY=1 for the tiny world
# shellcheck source=scripts/sdxl.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sdxl.sh"

#       flag               published     tiny world
setting method             direct
setting exp-name           ode_init_sdxl
setting data-path-train    runs/pairs    "${OUTPUT_DIR:-runs}/pairs"
setting sample-num-steps   1
setting batch-size         8             32
setting learning-rate-gen  1e-5          5e-4
setting lr-scheduler       constant      cosine
setting lr-warmup-steps    500           50
setting max-train-steps    2000          350
setting sample-steps       100           100
setting checkpoint-steps   500           175
setting batch-size-test    2             8
launch "$@"
