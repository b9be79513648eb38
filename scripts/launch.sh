#!/usr/bin/env bash
# What every launcher shares.  A launcher is a table of settings and one line that starts the run:
#
#   source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"
#   #       flag               published   tiny world
#   setting learning-rate-gen  1e-7        2e-4
#   launch "$@"
#
# A setting is overridden by the environment (LEARNING_RATE_GEN=1e-6) or by an extra argument (--learning-rate-gen 1e-6),
# which wins.  TINY=1 takes the third column, on the models in checkpoints/, and makes the data that is missing.
# NUM_PROCESSES defaults to the GPUs that are here; BACKEND says what they share: ddp (nothing), fsdp2, zero2, zero3.
# On several machines: multi_node/multi.sh.
BACKEND="${BACKEND:-ddp}"
[[ "$BACKEND" != zero* ]] || TRAIN_T2I_EXTRAS="${TRAIN_T2I_EXTRAS:-} deepspeed"
[[ "${TINY:-0}" == 1 ]] || TRAIN_T2I_EXTRAS="${TRAIN_T2I_EXTRAS:-} bitsandbytes" # 8-bit AdamW, in every published row
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=scripts/tiny_data.sh
source "$SETUP_ROOT/scripts/tiny_data.sh"

TINY="${TINY:-0}"
[[ "$TINY" == 0 || "$TINY" == 1 ]] || setup_fail "TINY=$TINY: neither 0 nor 1" "set TINY=1 for the tiny world"
ARGUMENTS=()
# shellcheck disable=SC2034 # the launchers name files in it
CHECKPOINTS="$SETUP_ROOT/checkpoints" # shipped and fetched weights

setting() { # FLAG PUBLISHED [TINY]: one row; a column of "-" leaves the flag out
  local variable value
  variable="$(printf '%s' "$1" | tr 'a-z-' 'A-Z_')"
  value="$2"
  [[ "$TINY" == 0 ]] || value="${3-$2}"
  value="${!variable-$value}"
  [[ "$value" == - ]] || ARGUMENTS+=("--$1=$value")
}

num_gpus() { # those that CUDA_VISIBLE_DEVICES leaves visible
  local -a visible
  local device count=0
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    for device in ${visible[@]+"${visible[@]}"}; do
      [[ "$device" != -1 ]] || break # CUDA hides what follows
      count=$((count + 1))
    done
    echo "$count"
  elif command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --list-gpus 2>/dev/null | wc -l
  else
    echo 0
  fi
}

check_count() { # VARIABLE VALUE: before it is reckoned with, since bash would evaluate any expression
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || setup_fail "$1=$2: not a count" "set $1 to a whole number from 1 up, or leave it out"
}

make_tiny_data() { # EXTRA ARGUMENTS...: what the tiny column names and nobody has made; nothing where the caller names other data
  local folder="${OUTPUT_DIR:-runs}" argument pairs prompts model
  [[ "$TINY" == 1 && -z "${DATA_PATH_TRAIN+given}" ]] || return 0
  for argument in "$@"; do
    [[ ! "$argument" =~ ^(-h|--help|--dry[-_]run|--data[-_]path[-_]train) ]] || return 0
  done
  mkdir -p -- "$folder"
  ( # nodes that share the folder, one at a time; the lock ends with this subshell
    ! command -v flock >/dev/null 2>&1 || flock 9
    for argument in "${ARGUMENTS[@]}"; do # pairs of tiny-sdxl, pairs_NAME of another
      case "$argument" in
        "--data-path-train=$folder/edits/metadata.json") [[ -e "$folder/edits" ]] || tiny_edits "$folder/edits" ;;
        "--data-path-train=$folder/images/metadata.csv") [[ -e "$folder/images" ]] || tiny_images "$folder/images" ;;
        "--data-path-train=$folder/"*)
          [[ -e "$folder/prompts.txt" ]] || tiny_prompts "$folder/prompts.txt"
          [[ "$argument" == "--data-path-train=$folder/pairs"* ]] || continue
          pairs="${argument#--data-path-train=}" prompts="$folder/prompts.txt"
          if [[ "$pairs" == *_edit ]]; then
            [[ -e "$folder/edits" ]] || tiny_edits "$folder/edits"
            prompts="$folder/edits/metadata.json"
          fi
          model="${pairs##*pairs}"
          [[ -e "$pairs/metadata.csv" ]] || tiny_pairs "$pairs" "$prompts" 768 "${model#_}"
          ;;
      esac
    done
  ) 9>"$folder/.tiny_data.lock"
}

launch() { # EXTRA ARGUMENTS...: starts the run in this process
  local count machines="${NUM_MACHINES:-1}"
  local -a starter=()
  count="${NUM_PROCESSES:-$(num_gpus)}"
  [[ -n "${NUM_PROCESSES:-}" || "$count" != 0 ]] || count=1
  check_count NUM_PROCESSES "$count" || return
  check_count NUM_MACHINES "$machines" || return
  [[ "$BACKEND" =~ ^(ddp|fsdp2|zero2|zero3)$ ]] || setup_fail "BACKEND=$BACKEND: unknown" "one of ddp, fsdp2, zero2, zero3" || return
  if ((count * machines > 1)); then
    starter=(accelerate.commands.launch --config_file "$SETUP_ROOT/scripts/accelerate/$BACKEND.yaml" --num_processes $((count * machines)))
  fi
  if ((machines > 1)); then # MACHINE_RANK, MASTER_ADDR and MASTER_PORT: see multi_node/multi.sh
    starter+=(--num_machines "$machines" --machine_rank "$MACHINE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
  fi
  # torch's launcher passes a signal on to its processes and kills them 30 s later; a step and a checkpoint may take longer
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
  make_tiny_data "$@" >&2
  exec "$PYTHON" -m ${starter[@]+"${starter[@]}" -m} train_t2i train "${ARGUMENTS[@]}" "$@"
}
