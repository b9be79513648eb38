#!/usr/bin/env bash
# Supervised training of all of Qwen-Image's weights on image-text pairs.  BACKEND=ddp|fsdp2|zero2|zero3.
#
#   bash scripts/single_node/train_qwen_image.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/qwen_image_edit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../qwen_image_edit.sh"

qwen_image # these rows come first
supervised
#       flag          published
setting exp-name      train_qwen_image
launch "$@"
