#!/usr/bin/env bash
# What quickstart.sh and reproduce.sh share: stages that are done once, the data of the tiny world, one evaluation.
# Expects WORK, the folder of everything that is made.
# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=scripts/tiny_data.sh
source "$SETUP_ROOT/scripts/tiny_data.sh"

export TINY=1 NUM_PROCESSES=1 OUTPUT_DIR="$WORK" SEED="${SEED:-30}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is in the checkout
LAUNCHERS="$SETUP_ROOT/scripts/single_node"
CHECKPOINTS="$SETUP_ROOT/checkpoints"
EVALUATION_PROMPTS="${EVALUATION_PROMPTS:-500}"
TABLE="${TABLE:-$WORK/table.json}"
mkdir -p -- "$WORK"

# The files that decide what a stage makes, beside its own command and settings and the tiny models themselves
RECIPE=("$SETUP_ROOT"/scripts/{tiny_data.sh,tiny_world.sh,flow.sh,direct.sh,sdxl*.sh} "$LAUNCHERS"/*.sh)

digest() { # COMMAND...: of a stage's command and recipe, comments left out; the same in every folder, on every interpreter
  local words=("$@")
  words=("${words[@]//"$WORK"/WORK}")
  words=("${words[@]//"$PYTHON"/python}")
  {
    printf '%s\n' "${words[@]}" "$SEED" "$EVALUATION_PROMPTS"
    sed '/^ *#/d' "${RECIPE[@]}" "$CHECKPOINTS/tiny-recipes.json"
  } | if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi
}

stage() { # NAME COMMAND...: runs once; a finished stage is skipped, an interrupted one goes on, another recipe's is refused
  local name="$1" done="$WORK/.done/$1" start=$SECONDS made_by
  shift
  made_by="$(digest "$@")"
  if [[ -e "$done" ]]; then # seconds, digest
    [[ "$(sed -n 2p "$done")" == "$made_by" ]] ||
      setup_fail "$name in $WORK was made with other settings or another recipe" "remove $WORK or set WORK to another folder" || exit
    printf '== %s: already done\n' "$name"
    return
  fi
  printf '== %s\n' "$name"
  "$@"
  mkdir -p -- "$WORK/.done"
  printf '%d\n%s\n' $((SECONDS - start)) "$made_by" >"$done"
  printf '== %s: %d s\n' "$name" $((SECONDS - start))
}

scenes() { # the data of the world: prompts to train on, held-out prompts and rendered scenes to judge by
  tiny_prompts "$WORK/prompts.txt"
  "$PYTHON" -m shapes.scenes prompts --split heldout --count "$EVALUATION_PROMPTS" --seed 7 --out "$WORK/eval_prompts.txt"
  "$PYTHON" -m shapes.scenes render --split heldout --count 2000 --seed 8 --out "$WORK/reference"
}

pairs() { tiny_pairs "$WORK/pairs${2:+_$2}" "$WORK/prompts.txt" "$1" "${2:-sdxl}" "${3:-}"; } # COUNT [FAMILY [GUIDANCE]]

records() { printf '%s/%s/checkpoints/torch_units/step-%d.pt' "$WORK" "$1" "$2"; } # RUN STEP

train() { # LAUNCHER EXP_NAME FLAGS...: a training stage, from its newest checkpoint where there is one
  local launcher="$1" name="$2"
  shift 2
  DATA_PATH_TRAIN="${DATA_PATH_TRAIN:-$WORK/prompts.txt}" EXP_NAME="$name" \
    bash "$LAUNCHERS/$launcher.sh" --auto-resume --sample-prompts "$WORK/eval_prompts.txt" "$@"
}

evaluate() { # NAMES FLAGS...: a row of $TABLE for each of the comma list
  local name="$1"
  shift
  "$PYTHON" -m train_t2i evaluate "$@" --name "$name" --out "$TABLE" --prompts "$WORK/eval_prompts.txt" \
    --count "$EVALUATION_PROMPTS" --batch-size 50 --scorer shapes.oracle:adherence \
    --clip-reward-model "$CHECKPOINTS/tiny-clip" --hpsv2-reward-model "$CHECKPOINTS/tiny-hps" \
    --held-out-model "$CHECKPOINTS/tiny-clip-heldout" --reference "$WORK/reference/metadata.csv" --save-images "$WORK/grids"
}

evaluate_teacher() { # [FAMILY [NAME [GUIDANCE]]]
  tiny_teacher "${1:-sdxl}"
  evaluate "${2:-teacher}" --teacher "${TEACHER[@]}" --teacher-num-steps 25 --teacher-cfg "${3:-$TEACHER_CFG}"
}

teacher_rows() { # FAMILY NAME: Qwen-Image's has one more, at guidance 2: there its pictures are best, at 3 what they show (docs/recipe.md)
  stage "evaluate-teacher-$1" evaluate_teacher "$1" "$2"
  [[ "$1" != qwen_image ]] || stage "evaluate-teacher-$1-2" evaluate_teacher "$1" "$2-2" "$TINY_GUIDANCE"
}
