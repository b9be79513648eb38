#!/usr/bin/env bash
# Starts one training script on several machines over SSH: on this one, the master, and on every worker.
#
#   MASTER_ADDR=10.0.0.1 WORKER_NODES="10.0.0.2 10.0.0.3" bash scripts/multi_node/multi.sh [--dry-run] [FLAGS of train]
#
# The workers hold the same checkout and the same data at the same place, and the master reaches them by SSH without a
# password.  --dry-run prints what each node would run.  When one node fails, the others are stopped and it is named.
set -euo pipefail

MASTER_ADDR="${MASTER_ADDR:-}"                                       # this machine, as the workers reach it
MASTER_PORT="${MASTER_PORT:-29500}"
WORKER_NODES="${WORKER_NODES:-}"                                     # addresses, separated by spaces
TRAIN_SCRIPT="${TRAIN_SCRIPT:-scripts/multi_node/dmdr_sdxl_refl.sh}" # relative to REMOTE_DIR
REMOTE_DIR="${REMOTE_DIR:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../train_t2i/sdxl" && pwd -P)}"
SOURCE_DIR="${SOURCE_DIR:-/conda/bin/activate}"                      # conda's activate (env dmdr) or a .venv/bin/activate
CONDA_ENV="${CONDA_ENV:-dmdr}"
NUM_PROCESSES="${NUM_PROCESSES:-8}"                                  # a node
SSH_OPTIONS="${SSH_OPTIONS:--o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
TRAVEL='^(NCCL_|GLOO_|OMP_|WANDB_MODE$|TINY$|HF_HUB_OFFLINE$)'       # variables that every node gets; never a key

fail() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

node_command() { # RANK FLAGS...: one line of bash, every value quoted
  local rank="$1" name
  shift
  printf 'cd -- %q && source %q' "$REMOTE_DIR" "$SOURCE_DIR"
  [[ "$SOURCE_DIR" != *conda* ]] || printf ' %q' "$CONDA_ENV"
  printf ' && exec env'
  while read -r name; do printf ' %s=%q' "$name" "${!name}"; done < <(compgen -e | grep -E "$TRAVEL" || true)
  printf ' MASTER_ADDR=%q MASTER_PORT=%q NUM_MACHINES=%d MACHINE_RANK=%d NUM_PROCESSES=%q' \
    "$MASTER_ADDR" "$MASTER_PORT" "${#NODES[@]}" "$rank" "$NUM_PROCESSES"
  printf ' bash %q' "$TRAIN_SCRIPT"
  (($# == 0)) || printf ' %q' "$@"
}

start() { # RANK FLAGS...: in the background
  local rank="$1" command
  command="$(node_command "$@")"
  if ((rank == 0)); then
    bash -c "$command" &
  else
    # The remote login shell may be any shell: it only sees `bash -c` and one quoted word. -tt: the node's part ends
    # with the connection.
    # shellcheck disable=SC2086  # options are words
    ssh -tt $SSH_OPTIONS -- "${NODES[rank]}" "bash -c $(single_quoted "$command")" </dev/null &
  fi
  PIDS[rank]=$!
}

single_quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

stop_all() { kill -- "${PIDS[@]}" 2>/dev/null || true; }

watch_nodes() { # ends when all have ended, or with the first that fails
  local finished rank code
  while ((${#PIDS[@]} > 0)); do
    code=0
    wait -n -p finished "${PIDS[@]}" || code=$?
    for rank in "${!PIDS[@]}"; do
      [[ "${PIDS[rank]}" == "${finished:-}" ]] || continue
      unset "PIDS[rank]"
      ((code == 0)) && continue
      printf 'error: node %d (%s) ended with code %d; stopping the others\n' "$rank" "${NODES[rank]}" "$code" >&2
      stop_all
      exit "$code"
    done
  done
}

DRY_RUN=0
FLAGS=()
for flag in "$@"; do if [[ "$flag" == --dry-run ]]; then DRY_RUN=1; else FLAGS+=("$flag"); fi; done
[[ -n "$MASTER_ADDR" ]] || fail "MASTER_ADDR is not set" "set it to this machine's address, as the workers reach it"
[[ -n "$WORKER_NODES" ]] || fail "WORKER_NODES is not set" "list the other machines' addresses, separated by spaces"
[[ -e "$REMOTE_DIR/$TRAIN_SCRIPT" ]] || fail "TRAIN_SCRIPT=$TRAIN_SCRIPT: not in $REMOTE_DIR" "give it relative to REMOTE_DIR"
read -ra WORKERS <<<"$WORKER_NODES"
NODES=("$MASTER_ADDR" "${WORKERS[@]}")
for node in "${NODES[@]}"; do
  [[ "$node" =~ ^[A-Za-z0-9_.:@%-]+$ && "$node" != -* ]] || fail "$node: not a host name or an address" "see WORKER_NODES"
done

PIDS=()
if ((DRY_RUN)); then
  for rank in "${!NODES[@]}"; do printf '%s: %s\n' "${NODES[rank]}" "$(node_command "$rank" ${FLAGS[@]+"${FLAGS[@]}"})"; done
  exit
fi
trap 'stop_all; exit 75' INT TERM
for rank in "${!NODES[@]}"; do start "$rank" ${FLAGS[@]+"${FLAGS[@]}"}; done
watch_nodes
