#!/usr/bin/env bash
# Builds docs/ into runs/docs, without network: pages that open in any browser, their search too.  A broken link is an error.
#
#   bash scripts/docs.sh [MKDOCS BUILD ARGUMENTS]
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$SETUP_ROOT"
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --quiet "$@"
printf 'documentation: %s\n' "${SETUP_ROOT}/runs/docs/index.html"
