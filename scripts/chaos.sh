#!/usr/bin/env bash
# Kill runs at random and resume them, on the tiny world: see tests/chaos.py and docs/failures.md.
#
#   bash scripts/chaos.sh [--kills 300] [--seed 0] [--out FILE.json] [--root FOLDER]
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
export PYTHONPATH="$SETUP_ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$SETUP_ROOT/tests/chaos.py" "$@"
