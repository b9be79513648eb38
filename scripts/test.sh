#!/usr/bin/env bash
# Lint, format, types, tests.  Sets up what it needs.
#
#   bash scripts/test.sh [--all] [PYTEST ARGUMENTS]
#
# --all adds the tests marked slow.  Budgets on 2 cores: 12 minutes, with --all 60; TEST_BUDGET_S sets another.
set -euo pipefail
TRAIN_T2I_EXTRAS="${TRAIN_T2I_EXTRAS-deepspeed bitsandbytes datasets}" # every backend, the 8-bit optimizer and the hub are tested
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$SETUP_ROOT"

marks=(-m "not slow")
budget_s=720
if [[ "${1:-}" == "--all" ]]; then
  shift
  marks=()
  budget_s=3600
fi
budget_s="${TEST_BUDGET_S:-$budget_s}"

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=offline DO_NOT_TRACK=1 # a test that needs the network is wrong
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false

within_budget() { # COMMAND...: stops it when the budget is spent
  local left=$((budget_s - SECONDS))
  ((left > 0)) || left=1
  if command -v timeout >/dev/null 2>&1; then
    timeout --foreground --kill-after=30 "$left" "$@"
  else
    "$@"
  fi
}

failed=""
step() { # NAME COMMAND...: runs it, says how long it took, and remembers whether it failed
  local name="$1" start=$SECONDS code=0
  shift
  printf '== %s\n' "$name"
  within_budget "$@" || code=$?
  printf '== %s: %s after %d s\n' "$name" "$([[ $code == 0 ]] && printf passed || printf 'failed (%d)' "$code")" $((SECONDS - start))
  if [[ $code == 124 || $code == 137 ]]; then
    printf 'error: the budget of %d s is spent\n' "$budget_s" >&2
    printf 'hint: see --durations=20 for the slow tests, or set TEST_BUDGET_S on a slower machine\n' >&2
  fi
  [[ $code == 0 ]] || failed="${failed:+$failed, }$name"
}

step "ruff check" "$PYTHON" -m ruff check .
step "ruff format" "$PYTHON" -m ruff format --check .
step "mypy" "$PYTHON" -m mypy
step "pytest" "$PYTHON" -m pytest ${marks[@]+"${marks[@]}"} "$@"
[[ -z "$failed" ]] || {
  printf 'failed: %s (%d s)\n' "$failed" "$SECONDS"
  exit 1
}
printf 'all passed in %d s\n' "$SECONDS"
