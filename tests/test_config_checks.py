"""Mistakes in flags: out of bounds, combinations that cannot work, flags that do nothing."""

from __future__ import annotations

import pytest

from train_t2i.__main__ import main
from train_t2i.acting_flags import CONDITIONAL
from train_t2i.cli import parse
from train_t2i.config import METHOD_NAMES, fields_of
from train_t2i.errors import EXIT_DONE, EXIT_USER

# -- mistakes in flags -----------------------------------------------------------------------------------------------


def mistake(capsys, *arguments: str) -> str:
    """The one line that a mistake in flags is told in."""
    assert main(["train", *arguments]) == EXIT_USER
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert {line.split(":")[0] for line in err.splitlines()} <= {"error", "hint"}, err
    return err


OUT_OF_RANGE = [
    "--batch-size 0", "--batch-size -1", "--batch-size 1.5", "--batch-size", "--batch-size x", "--batch-size 1e9999",
    "--ratio-update 0", "--max-train-steps 0", "--max-train-steps -5", "--sample-num-steps 0",
    "--learning-rate-gen -1", "--learning-rate-gen nan", "--learning-rate-gen inf", "--learning-rate-gui=-1e-5",
    "--lr-warmup-steps -1", "--lora-rank 0", "--lora-scale-f -1", "--cfg-r 0.5", "--cfg-f -7", "--shift 0",
    "--adam-beta1 1", "--adam-beta2 -0.1", "--adam-epsilon -1", "--adam-weight-decay -1", "--max-grad-norm -1",
    "--gradient-accumulation-steps 0", "--seed -1", "--seed 99999999999999999999", "--sample-steps -1",
    "--checkpoint-steps -1", "--checkpoint-minutes -1", "--checkpoints-total-limit -1", "--max-skipped 0",
    "--cold-start-iter -1", "--dynamic-step -1", "--gen-b 0", "--gui-b -1", "--reward-clip-weight -1",
    "--monitor-seeds 1", "--guard-reward-drop -1", "--guard-diversity-drop 1", "--guard-factor 1", "--reward-guard maybe",
    "--dmd-weight -1", "--batch-size-test 0", "--teacher-num-steps 0", "--teacher-cfg 0",
    "--mixed-precision fp8", "--compile all", "--base-quant int4", "--layout pair", "--method magic", "--model-family sd9", "--s-type-gui normal",
    "--lr-scheduler quadratic", "--use-lora-gen maybe", "--report-to nowhere", "--report-to ''",
    "--resolution 0", "--resolution -64", "--resolution 64x", "--resolution 64x64x64", "--resolution big",
    "--resolution 60", "--resolution 64x20", "--resolution ²",
]  # fmt: skip


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_values_out_of_range_name_their_flag(capsys, flags):
    words = flags.replace("''", "").split(" ")
    assert words[0].partition("=")[0] in mistake(capsys, *words)


def test_values_out_of_range_of_another_method(capsys):
    assert "--num-workers -1: must be at least 0" in mistake(capsys, "--method", "sft", "--num-workers", "-1")


CANNOT_WORK = [
    ("--nonsense 3", "--nonsense: unknown flag"),
    ("stray", "stray"),
    ("--caption-dropout 0.1", "--method sft"),
    ("--method direct --cfg-r 3", "--method dmdr"),
    ("--layout shared", "--use-lora-gen"),
    ("--layout paired --use-lora-gen", "--use-lora-gen"),
    ("--layout shared --use-lora-gen --generator-init x", "--layout paired_lora"),
    ("--layout shared --use-lora-gen --xl-ode-pretrain-path x", "--xl-ode-pretrain-path"),
    ("--generator-init x --xl-ode-pretrain-path y", "give one"),
    ("--base-quant nf4 --backend fsdp2", "--base-quant nf4 does not go with --backend fsdp2"),
    ("--base-quant fp8 --backend zero2", "use --backend ddp"),
    ("--base-quant int8 --backend zero3", "quantised weights are not shared out"),
    ("--offload-optimizer --backend zero2", "--offload-optimizer does not go with --backend zero2"),
    ("--offload-optimizer --backend zero3", "use --backend ddp or fsdp2"),
    ("--xl-ode-pretrain-path x --sample-num-steps 4", "one-step student"),
    ("--layout separate --sample-num-steps 4 --dynamic-step 5", "--lora-scale-r 0"),
    ("--sample-num-steps 4 --s-type-gen beta --gen-a 0", "--gen-a"),
    ("--s-type-gui beta --gui-a -1", "--gui-a"),
    ("--method arcflow", "give --use-lora-gen"),
    (
        "--method direct --sample-num-steps 4 --step-checkpointing --backend zero3",
        "--step-checkpointing does not go with --backend zero3",
    ),
    ("--method direct --sample-num-steps 4 --states-weight 1", "set --sample-type ode"),
    ("--method direct --sample-num-steps 4 --sample-type ode --states-weight 1 --max-row-steps 4", "give one"),
    ("--method direct --sample-num-steps 4 --max-pixels 4096 --shift 0", "give --shift a number"),
    ("--dataloader_num_workers 2 --model-family sdxl", "--num-workers does nothing where the data is prompts alone"),
    ("--cold-start-iter 10", "--clip-reward-model"),
    ("--cold-start-iter 10 --reward-clip-weight 0", "no reward model"),
    ("--reuse-rollout --sample-num-steps 4 --sample-type ode", "set --sample-type sde"),
    ("--hpsv2-reward-model x --srpo on --srpo-positive ,", "--srpo needs words on both sides"),
    ("--use-lora-gen --lora-targets to_(q", "--lora-targets to_(q: not a regular expression"),
    (
        "--use-lora-gen --lora-targets to_k,(?i)to_q",
        "--lora-targets (?i)to_q: not a regular expression for the end of a name",
    ),
    ("--use-lora-gen --lora-targets to_q)|(to_k", "--lora-targets to_q)|(to_k: not a regular expression"),
    ("--use-lora-gen --lora-targets (?P<a>to_q),(?P<a>to_k)", "--lora-targets (?P<a>to_q),(?P<a>to_k): not a regular"),
    ("--method sft --enable-bucket --random-hw-adapt --cache-rows", "--cache-rows does not go with --random-hw-adapt"),
    ("--dmd-weight 0", "trains nothing"),
    ("--dmd-weight 0 --clip-reward-model x --reward-clip-weight 0", "trains nothing"),
]


@pytest.mark.parametrize(("flags", "told"), CANNOT_WORK)
def test_combinations_that_cannot_work_name_the_fix(capsys, flags, told):
    assert told in mistake(capsys, *flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--layout separate --sample-num-steps 4 --dynamic-step 5 --lora-scale-r 0 --s-type-gui beta",
        "--use-lora-gen --generator-init x", "--use-lora-gen", "--sample-num-steps 4 --shift 3 --s-type-gen beta",
        "--cold-start-iter 10 --reward-clip-weight 0 --reward-hps-weight 0", "--cold-start-iter 10 --hpsv2-reward-model x",
        "--cold-start-iter 3000", "--s-type-gui logit_normal --gui-a -1", "--seed 9223372036854775807",
        "--dmd-weight 0 --hpsv2-reward-model x --cold-start-iter 0", "--cfg-r 1", "--resolution 64x1024",
    ],
)  # fmt: skip
def test_combinations_that_do_work(flags):
    parse(flags.split())


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/b", "a/", "/abs", "a\\b", "a\nb"])
def test_a_run_stays_inside_its_output_folder(capsys, name):
    assert f"--exp-name {name!r}: not a plain folder name" in mistake(capsys, f"--exp-name={name}")


@pytest.mark.parametrize("name", ["dmdr", "a.b", "...", "naïve run: 1", "-1"])
def test_any_plain_name_is_a_run(name):
    assert parse([f"--exp-name={name}"]).run.exp_name == name


# -- flags that act only beside others -------------------------------------------------------------------------------


WATCHED = "--extra-rewards 0.3*a:b --monitor-rewards clip=x"
FEW, ARC = "--sample-num-steps 4", "--method arcflow --use-lora-gen"
INERT = [  # the flag, beside what it does nothing, beside what it acts
    ("--sample-num-steps 4", "--method sft", ["", "--method direct"]),
    ("--shift 3", "", [FEW, f"--method direct {FEW}", "--method sft"]),
    ("--logit-mean 0.5", "--method sft", ["--method sft --weighting-scheme logit_normal"]),
    ("--logit-std 0.5", "--method sft", ["--method sft --weighting-scheme logit_normal"]),
    ("--mode-scale 0.5", "--method sft", ["--method sft --weighting-scheme mode"]),
    ("--uniform-sampling", "--method sft --weighting-scheme mode", ["--method sft --weighting-scheme cosmap"]),
    ("--trainable-modules attn", "--method sft --use-lora-gen", ["--method sft"]),
    ("--trainable-modules-low-learning-rate attn", "--method sft --use-lora-gen", ["--method sft"]),
    ("--sample-type ode", "", [FEW, f"--method direct {FEW}", "--method direct --max-row-steps 4"]),
    ("--step-checkpointing", "--method direct", [f"--method direct {FEW}", "--method direct --max-row-steps 4"]),
    ("--backprop-steps 1", "--method direct", [f"--method direct {FEW}"]),
    ("--states-weight 1", "--method direct", [f"--method direct --sample-type ode {FEW}"]),
    ("--feature-weight 1", "--method direct", ["--method direct --feature-model x"]),
    ("--sample-type ode", f"{ARC} {FEW}", [FEW]),
    ("--temperature 0.5", ARC, [f"{ARC} --policy gmflow"]),
    ("--momentum-rate 0.5", f"{ARC} --policy gmflow", [ARC]),
    ("--momentum-rate 0.5", f"{ARC} --num-components 1", [ARC]),
    ("--negative-prompt ugly", f"{ARC} --distill-cfg 1 --teacher-cfg 1", [ARC, f"{ARC} --distill-cfg 1"]),
    ("--sample-type ode", "--method sft", []),
    ("--lr-num-cycles 2", "--lr-scheduler cosine", ["--lr-scheduler cosine_with_restarts"]),
    ("--lr-power 2", "", ["--lr-scheduler polynomial --learning-rate-gen 1e-5 --learning-rate-gui 1e-5"]),
    ("--num-train-epochs 2", ARC, ["--method sft", "--method direct"]),
    ("--lora-targets to_q", "--method direct", ["--method direct --use-lora-gen", "", "--method sft --use-lora-gen"]),
    ("--srpo on", "--clip-reward-model x", ["--hpsv2-reward-model x"]),
    ("--srpo-k 0.2", "--hpsv2-reward-model x", ["--hpsv2-reward-model x --srpo on"]),
    ("--srpo-positive Real", "--hpsv2-reward-model x", ["--hpsv2-reward-model x --srpo on"]),
    ("--srpo-negative Flat", "--hpsv2-reward-model x", ["--hpsv2-reward-model x --srpo on"]),
    ("--magic-prompt x", "--hpsv2-reward-model x --srpo on", ["--hpsv2-reward-model x"]),
    ("--lora-rank 8", "--method direct", ["--method direct --use-lora-gen", ""]),
    ("--lora-rank 8", "--method sft", ["--method sft --use-lora-gen", "--use-lora-gen"]),
    ("--lora-rank 8", "--layout separate", ["--layout paired"]),
    ("--base-quant nf4", "--method direct", ["--method direct --use-lora-gen", "", "--use-lora-gen", "--layout separate"]),
    ("--base-quant int8", "--method sft", ["--method sft --use-lora-gen"]),
    ("--tiny-vae x", "--method direct", ["--clip-reward-model x", "--method direct --feature-model x"]),
    ("--tiny-vae x", "--method sft", ["--hpsv2-reward-model x --reward-hps-weight 0"]),
    ("--gradient-checkpointing decoder+rewards", "", ["--clip-reward-model x", "--method direct --feature-model x"]),
    ("--gradient-checkpointing decoder", "--method sft", ["--hpsv2-reward-model x"]),
    ("--tiny-vae x", "", ["--clip-reward-model x --cold-start-iter 3000"]),
    ("--teacher-cfg 3", "--method direct", ["", "--method sft", "--sample-steps 0"]),
    ("--teacher-num-steps 9", "--method direct", ["", "--method sft"]),
    ("--lora-scale-f 1", "--layout separate", ["", "--use-lora-gen", "--dmd-weight 0 --clip-reward-model x"]),
    ("--lora-scale-r 0.3", "", ["--dynamic-step 5", f"{FEW} --dynamic-step 5"]),
    ("--lora-scale-r 0", FEW, [f"{FEW} --dynamic-step 5 --s-type-gui beta"]),
    ("--dynamic-step 5", f"{FEW} --lora-scale-r 0 --s-type-gui logit_normal", [f"{FEW} --lora-scale-r 0 --s-type-gen beta"]),
    ("--dynamic-step 5", "--lora-scale-r 0", ["", FEW, "--lora-scale-r 0 --s-type-gui beta"]),
    ("--s-type-gen beta", "", [FEW]),
    ("--student-input path", "", [f"{FEW} --sample-type ode"]),
    ("--student-input path", FEW, [f"{FEW} --sample-type ode"]),
    ("--gen-a 3", FEW, [f"{FEW} --s-type-gen beta"]),
    ("--gen-b 3", FEW, [f"{FEW} --s-type-gen logit_normal"]),
    ("--gui-a 3", "", ["--s-type-gui beta"]),
    ("--gui-b 3", "", ["--s-type-gui logit_normal"]),
    ("--negative-prompt x", "--cfg-r 1 --teacher-cfg 1", ["", "--cfg-r 1", "--cfg-r 1 --cfg-f 2 --teacher-cfg 1"]),
    ("--negative-prompt x", "--cfg-r 1 --sample-steps 0", ["--sample-steps 0"]),
    ("--reward-clip-weight 1", "--hpsv2-reward-model x", ["--clip-reward-model x"]),
    ("--reward-hps-weight 1", "", ["--hpsv2-reward-model x"]),
    ("--reward-clip-weight 0 --reward-hps-weight 1", "", ["--hpsv2-reward-model x"]),
    ("--extra-reward-margin 1", "--clip-reward-model x", ["--extra-rewards 0.3*a:b"]),
    ("--reward-batch-size 1", "", ["--clip-reward-model x", "--extra-rewards 0.3*a:b"]),
    ("--monitor-seeds 3", "", ["--monitor-rewards clip=x"]),
    ("--monitor-reference x", "", ["--monitor-rewards clip=x"]),
    ("--reward-guard warn", "--monitor-rewards clip=x", [WATCHED, "--clip-reward-model x --monitor-rewards clip=x"]),
    ("--guard-reward-drop 1", WATCHED, [f"{WATCHED} --reward-guard {guard}" for guard in ("warn", "scale", "stop")]),
    ("--guard-diversity-drop 0.1", WATCHED, [f"{WATCHED} --reward-guard warn"]),
    ("--guard-factor 0.1", f"{WATCHED} --reward-guard warn", [f"{WATCHED} --reward-guard scale"]),
    ("--reward-margin 1", "--reward-clip-weight 0 --reward-hps-weight 0", ["--clip-reward-model x"]),
    ("--magic-prompt x", "--clip-reward-model x", ["--hpsv2-reward-model x"]),
    ("--magic-prompt=", "", ["--hpsv2-reward-model x"]),
    ("--source-size 512", "--model-family qwen_image", ["", "--model-family qwen_image_edit"]),
    ("--source-seen-size 512", "--model-family qwen_image_edit", ["", "--model-family qwen_image_edit_plus"]),
    ("--train-data-dir x", "--model-family sdxl", ["", "--method sft --model-family sdxl", "--train_mode qwen_image_edit"]),
    ("--num-workers 2", f"{ARC} --model-family flux", ["--method direct --model-family sdxl", "--model-family qwen_image_edit"]),
    ("--max-bad-fraction 0.1", "--method direct", ["--method sft", "--model-family qwen_image_edit"]),
    ("--max-bad-fraction 0.1", "--model-family sd3", ["", "--method sft --model-family sd3"]),
    ("--random-hw-adapt on", "--method sft", ["--method sft --enable-bucket --image_sample_size 768"]),
    ("--random-hw-adapt on", "--method sft --enable-bucket --resolution 760", ["--method sft --enable-bucket --resolution 1024x576"]),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "beside", "_"), INERT)
def test_a_flag_that_would_do_nothing_is_refused(capsys, flag, beside, _):
    told = mistake(capsys, *beside.split(), *flag.split())
    name = flag.split()[-2] if " " in flag else flag.rstrip("=")
    assert f"error: {name} does nothing " in told
    assert "hint: leave it out, or " in told


@pytest.mark.parametrize(("flag", "beside"), [(flag, beside) for flag, _, acts in INERT for beside in acts])
def test_the_same_flag_is_taken_where_it_acts(flag, beside):
    parse([*beside.split(), *flag.split()])


def test_every_conditional_flag_is_tried():
    tried = {word.rstrip("=") for flag, _, _ in INERT for word in flag.split() if word.startswith("--")}
    assert {"--" + rule.name.replace("_", "-") for rule in CONDITIONAL} == tried


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_default_may_always_be_spelled_out(method):
    """Published command lines name every flag."""
    fields = {name: field for name, field in fields_of(method).items() if field.default is not None}
    spelled = [f"--{name}={field.default}" for name, field in fields.items() if name != "method"]
    parse([*spelled, "--method", method, *(["--use-lora-gen"] if method == "arcflow" else [])])


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ("", "paired"), ("--use-lora-gen", "shared"), ("--use-lora-gen --generator-init x", "paired_lora"),
        ("--use-lora-gen --xl-ode-pretrain-path x", "paired_lora"), ("--layout separate", "separate"),
    ],
)  # fmt: skip
def test_the_layout_that_auto_stands_for(flags, layout):
    from train_t2i.config import resolved_layout

    assert resolved_layout(parse(flags.split()).run) == layout


def test_every_layout_can_be_chosen_and_timed():
    from train_t2i.benchmark import BenchmarkConfig
    from train_t2i.config import LAYOUTS

    assert fields_of("dmdr")["layout"].metadata["choices"] == ("auto", *LAYOUTS)
    assert BenchmarkConfig().layouts.split(",") == list(LAYOUTS)


@pytest.mark.parametrize("verb", ["pairs", "sample", "evaluate"])
def test_a_seed_leaves_room_for_the_images_after_the_first(capsys, verb):
    assert main([verb, "--seed", str(2**62 + 1)]) == EXIT_USER
    assert f"--seed {2**62 + 1}: must be at most {2**62}" in capsys.readouterr().err


def test_verbs(capsys):
    assert main(["fly"]) == EXIT_USER
    assert "fly: unknown verb" in capsys.readouterr().err
    assert main([]) == EXIT_USER
    assert main(["--help"]) == EXIT_DONE
    assert "train" in capsys.readouterr().out
