#!/usr/bin/env bash
# The methods beside each other on the tiny models, as much training time for each: Direct Distillation (the rendering of its
# teacher's results counted in), ArcFlow, distribution matching alone (DMD) and with rewards (DMDR).  Two families run at a
# time, each on half of the cores.  Stopped, it goes on where it was.
#
#   bash scripts/methods.sh                    runs/methods; WORK=DIR for another folder
#   bash scripts/methods.sh flux               one of sdxl sd3 flux qwen_image, or several
#   SECONDS_A_CELL=600 bash scripts/methods.sh
set -euo pipefail
export WORK="${WORK:-$(pwd -P)/runs/methods}"
export SECONDS_A_CELL="${SECONDS_A_CELL:-150}"
NUM_PAIRS=384
PROBE_STEPS=8
# shellcheck source=scripts/tiny_world.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/tiny_world.sh"

note() { # MODEL SECONDS_BEFORE RUNS: whose time is a model's, beside that of its runs
  printf '{"runs": ["%s"], "seconds_before": %d}\n' "${3// /\", \"}" "$2" >"$WORK/cells/$1.json"
}

probe() { # NAME SECONDS LAUNCHER FLAGS...: sets STEPS, how many a run of these settings takes in so many seconds
  local name="$1" seconds="$2"
  shift 2
  stage "probe-$name" train "$1" "probe-$name" "${@:2}" --sample-steps 0
  STEPS="$("$PYTHON" "$SETUP_ROOT/scripts/cells.py" steps "$WORK/probe-$name" "$seconds")"
}

direct() { # FAMILY LAUNCHER
  local rendered
  stage "pairs-$1" pairs "$NUM_PAIRS" "$1"
  rendered="$(head -n 1 "$WORK/.done/pairs-$1")"
  ((rendered < SECONDS_A_CELL)) || setup_fail "rendering took $rendered s, all of the cell's time" "set SECONDS_A_CELL higher"
  export DATA_PATH_TRAIN="$WORK/pairs_$1"
  probe "$1-direct-4" $((SECONDS_A_CELL - rendered)) "$2" --max-train-steps "$PROBE_STEPS"
  stage "$1-direct-4" train "$2" "$1-direct-4" --max-train-steps "$STEPS"
  unset DATA_PATH_TRAIN
  note "$1-direct-4" "$rendered" "$1-direct-4"
}

arcflow() { # FAMILY: a sixth of its steps on the teacher's way, no average before that
  probe "$1-arcflow-2" "$SECONDS_A_CELL" "arcflow_$1" --max-train-steps "$PROBE_STEPS" --mixing-steps "$PROBE_STEPS"
  stage "$1-arcflow-2" train "arcflow_$1" "$1-arcflow-2" --max-train-steps "$STEPS" --mixing-steps $((STEPS / 6)) --ema-start $((STEPS / 6))
  note "$1-arcflow-2" 0 "$1-arcflow-2"
}

dmd_and_dmdr() { # FAMILY CALLS COLD_LAUNCHER REFL_LAUNCHER: rewards come after a third of the time
  local calls=(--sample-num-steps "$2") dmd="$1-dmd-$2" dmdr="$1-dmdr-$2" cold
  probe "$dmd" "$SECONDS_A_CELL" "$3" "${calls[@]}" --max-train-steps "$PROBE_STEPS" --cold-start-iter "$PROBE_STEPS"
  cold=$((STEPS / 3))
  stage "$dmd" train "$3" "$dmd" "${calls[@]}" --max-train-steps "$STEPS" --cold-start-iter "$STEPS"
  stage "$dmdr-cold" train "$3" "$dmdr-cold" "${calls[@]}" --max-train-steps "$cold" --cold-start-iter "$cold"
  RESUME_CKPT="$(records "$dmdr-cold" "$cold")"
  export RESUME_CKPT
  calls+=(--cold-start-iter "$cold" --reward-clip-weight 1)
  probe "$dmdr" $((SECONDS_A_CELL * 2 / 3)) "$4" "${calls[@]}" --max-train-steps $((cold + PROBE_STEPS))
  stage "$dmdr" train "$4" "$dmdr" "${calls[@]}" --max-train-steps $((cold + STEPS))
  unset RESUME_CKPT
  note "$dmd" 0 "$dmd"
  note "$dmdr" 0 "$dmdr-cold $dmdr"
}

compare() { # FAMILY
  local -a models=()
  local calls cell
  TABLE="$WORK/table-$1.json"
  teacher_rows "$1" "$1-teacher"
  case "$1" in
    sdxl | sd3 | flux) direct "$1" "direct_distill_$1" ;;
    qwen_image) direct "$1" direct_distill_qwen_image_lora ;;
  esac
  case "$1" in # ArcFlow has a head for these two
    flux | qwen_image) arcflow "$1" ;;
  esac
  for calls in 4 2; do
    case "$1" in
      sdxl) dmd_and_dmdr "$1" "$calls" cold_start_sdxl_4step dmdr_sdxl_4step_refl ;;
      sd3) dmd_and_dmdr "$1" "$calls" cold_start_sd3 dmdr_sd3_refl ;;
      *) dmd_and_dmdr "$1" "$calls" "cold_start_$1_${calls}step" "dmdr_$1_${calls}step_refl" ;;
    esac
  done
  for cell in "$WORK/cells/$1"-*.json; do models+=("$(basename "$cell" .json)"); done
  stage "evaluate-$1" evaluate "$(IFS=, && echo "${models[*]}")" "${models[@]/#/$WORK/}"
}

[[ "$SECONDS_A_CELL" =~ ^[1-9][0-9]*$ ]] || setup_fail "SECONDS_A_CELL=$SECONDS_A_CELL: not a count" "set it to whole seconds, 60 or more"
families=("$@")
((${#families[@]})) || families=(qwen_image flux sd3 sdxl) # the longest first
for family in "${families[@]}"; do
  [[ "$family" =~ ^(sdxl|sd3|flux|qwen_image)$ ]] || setup_fail "unknown family $family" "one of sdxl sd3 flux qwen_image"
done
stage scenes scenes
if ((${#families[@]} > 1)); then
  cores="$(getconf _NPROCESSORS_ONLN)"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((cores + 1) / 2))}"
  printf '%s\n' "${families[@]}" | xargs -P 2 -n 1 bash "${BASH_SOURCE[0]}"
else
  mkdir -p -- "$WORK/cells"
  compare "${families[0]}" 2>&1 | while IFS= read -r line; do printf '%s: %s\n' "${families[0]}" "$line"; done
fi
"$PYTHON" "$SETUP_ROOT/scripts/cells.py" table "$WORK"
printf 'table: %s\n' "$WORK/table.md"
