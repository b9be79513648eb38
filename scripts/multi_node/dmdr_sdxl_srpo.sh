#!/usr/bin/env bash
# One node's part of the single-node launcher of the same name: multi.sh gives NUM_MACHINES, MACHINE_RANK and MASTER_ADDR.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../single_node/dmdr_sdxl_srpo.sh" "$@"
