#!/usr/bin/env bash
# ArcFlow: Qwen-Image in two network calls, each of which says a velocity for half of the way.  BACKEND=ddp|fsdp2|zero2|zero3.
#
#   bash scripts/single_node/arcflow_qwen_image.sh [FLAGS]    TINY=1 for the tiny world
# shellcheck source=scripts/flow.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../flow.sh"

qwen_image 2 # these rows come first
arcflow 1000 15000
#       flag          published
setting exp-name      arcflow_qwen_image
launch "$@"
