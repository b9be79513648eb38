#!/usr/bin/env bash
# The same run under Slurm: one task a node, each running TRAIN_SCRIPT.
#
#   sbatch --nodes 3 --gpus-per-node 8 scripts/multi_node/slurm.sh [FLAGS of train]
#
# Submit from the folder in which the script is to run (REMOTE_DIR names another).  TRAIN_SCRIPT, SOURCE_DIR, CONDA_ENV,
# NUM_PROCESSES and MASTER_PORT as for multi.sh.  Before the time limit, on preemption and on scancel --signal TERM --batch
# the run saves; then the job is queued again and goes on from its newest checkpoint.
#SBATCH --job-name=train_t2i
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
set -euo pipefail

TRAIN_SCRIPT="${TRAIN_SCRIPT:-scripts/multi_node/dmdr_sdxl_refl.sh}"
SOURCE_DIR="${SOURCE_DIR:-/conda/bin/activate}"
fail() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

[[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is a script for sbatch" "sbatch scripts/multi_node/slurm.sh; without Slurm: multi.sh"
cd -- "${REMOTE_DIR:-$SLURM_SUBMIT_DIR}"
[[ -e "$TRAIN_SCRIPT" ]] || fail "TRAIN_SCRIPT=$TRAIN_SCRIPT: not in $PWD" "submit from the folder in which it is to run, or set REMOTE_DIR"
[[ -r "$SOURCE_DIR" ]] || fail "SOURCE_DIR=$SOURCE_DIR: not there" "name conda's activate or a .venv/bin/activate"
CONDA_ENV="${CONDA_ENV-dmdr}"
set +u # activate scripts read variables that are not set
# shellcheck disable=SC1090
source "$SOURCE_DIR" ${CONDA_ENV:+"$CONDA_ENV"} </dev/null
set -u

MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # jobs that share a machine do not meet
export MASTER_ADDR MASTER_PORT TRAIN_SCRIPT
export NUM_MACHINES="$SLURM_JOB_NUM_NODES" NUM_PROCESSES="${NUM_PROCESSES:-${SLURM_GPUS_ON_NODE:-8}}"

# The trainer's own word on how it ended, since launchers wrap exit codes: OUTPUT_DIR/EXP_NAME/.exit_code
probe="$(dirname -- "$(realpath -- "$TRAIN_SCRIPT")")/../../train_t2i/launch/probe.py"
marker=""
[[ ! -e "$probe" ]] || marker="$(python "$probe" marker "$TRAIN_SCRIPT" "$@")" # a wrong flag ends it here
[[ -z "$marker" ]] || rm -f -- "$marker"

# To the step, since srun itself would end it by force
# shellcheck disable=SC2329 # the trap calls it
forward() { scancel --signal TERM "$SLURM_JOB_ID.0" 2>/dev/null || true; }
trap forward TERM INT
# a task's rank is the node's: SLURM_NODEID is known there only
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash -c 'MACHINE_RANK="$SLURM_NODEID" exec bash -- "$TRAIN_SCRIPT" "$@"' task --auto-resume "$@" &
step=$!
while true; do # wait returns for a signal as well
  code=0
  wait "$step" || code=$?
  kill -0 "$step" 2>/dev/null || break
done

said="$([[ -z "$marker" ]] || cat -- "$marker" 2>/dev/null || true)"
if [[ "$said" == 75 && "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" == RUNNING ]]; then # not cancelled
  printf 'slurm: saved after a signal; the job is queued again\n'
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
fi
[[ "$code" == 0 || ! "$said" =~ ^[1-9][0-9]*$ ]] || code="$said"
exit "$code"
