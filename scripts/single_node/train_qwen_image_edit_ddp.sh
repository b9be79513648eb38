#!/usr/bin/env bash
# Supervised training of all of Qwen-Image-Edit's weights on (source, instruction, target), with plain data parallelism.
#
#   bash scripts/single_node/train_qwen_image_edit_ddp.sh [FLAGS]    TINY=1 for the tiny world
BACKEND="${BACKEND:-ddp}"
# shellcheck source=scripts/qwen_image_edit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../qwen_image_edit.sh"

qwen_image_edit # these rows come first
supervised
#       flag          published
setting exp-name      train_qwen_image_edit_ddp
launch "$@"
