#!/usr/bin/env bash
# Starts one training script on several machines over SSH: on this one, the master, and on every worker.
#
#   MASTER_ADDR=10.0.0.1 WORKER_NODES="10.0.0.2 10.0.0.3" bash scripts/multi_node/multi.sh [--dry-run] [FLAGS of train]
#
# --help names every setting; docs/multi_node.md tells the rest.  Any Python from 3.11 up will do, without packages.
set -euo pipefail

root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
for python in "${VIRTUAL_ENV:-}/bin/python" "$root/.venv/bin/python" python3 python3.12 python3.11 python; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m train_t2i.launch "$@"
done
printf 'error: no Python 3.11 or newer was found\nhint: activate the environment first\n' >&2
exit 2
