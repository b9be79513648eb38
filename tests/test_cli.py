"""Flags and their mistakes: every spelling, every bound, every file that cannot be used is one line and exit code 2."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from train_t2i.__main__ import main
from train_t2i.cli import ALIASES, make_parser, parse, spelled
from train_t2i.config import METHOD_CONFIGS, METHOD_NAMES, Config, DMDRConfig, Settings, fields_of
from train_t2i.config_checks import CONDITIONAL
from train_t2i.errors import EXIT_DONE, EXIT_USER, UserError

ROOT = Path(__file__).parents[1]


def run_of(*arguments: str) -> Config:
    return parse(arguments).run


# -- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "3"], ["--batch_size", "3"], ["--batch_size=3"], ["--batch-size=3"],
        ["--train_batch_size", "3"], ["--train-batch-size=3"], ["--batch-size", "8", "--train_batch_size", "3"],
    ],
)  # fmt: skip
def test_dashes_underscores_and_aliases_are_equal_and_the_last_wins(arguments):
    assert run_of(*arguments) == dataclasses.replace(Config(), batch_size=3)


def test_every_alias_leads_to_a_setting():
    fields = {name for method in METHOD_NAMES for name in fields_of(method)}
    for alias, ours in ALIASES.items():
        assert ours in fields
        assert alias not in fields
        assert (
            spelled(f"--{alias}")
            == spelled(f"--{alias.replace('_', '-')}=").rstrip("=")
            == "--" + ours.replace("_", "-")
        )
    wanted = {"pretrained_model_name_or_path", "train_batch_size", "resume_from_checkpoint", "checkpointing_steps"}
    assert wanted <= ALIASES.keys()


def test_values_keep_their_underscores():
    assert run_of("--exp-name", "a_b", "--output-dir=c_d").exp_name == "a_b"
    assert run_of("--output-dir=c_d").output_dir == "c_d"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--use-lora-gen"], True), (["--use-lora-gen", "true"], True), (["--use_lora_gen=1"], True),
        (["--use-lora-gen", "off"], False), (["--use-lora-gen", "--use-lora-gen=no"], False), ([], False),
        (["--use-lora-gen", "--seed", "3"], True),
    ],
)  # fmt: skip
def test_plain_flags_are_on_and_off(arguments, expected):
    assert run_of(*arguments).use_lora_gen is expected


def test_flags_are_not_guessed_from_their_beginning():
    with pytest.raises(UserError, match="--batch-siz: unknown flag"):
        parse(["--batch-siz", "3"])


# -- every field -----------------------------------------------------------------------------------------------------


def example(field: dataclasses.Field, kind: type) -> str:
    """A value other than the default that is within its bounds."""
    limits = field.metadata
    if limits["choices"]:
        return next(choice for choice in limits["choices"] if choice != field.default)
    if "bool" in str(field.type):
        return "off" if field.default else "on"
    if "int" in str(field.type) or "float" in str(field.type):
        high = limits["high"] if limits["high"] is not None else limits["below"] or float("inf")
        number = field.default + 1 if field.default + 1 < high else field.default / 2
        return str(int(number) if "int" in str(field.type) else number)
    return {"resolution": "64x32", "report_to": "tensorboard", "config": "absent.yaml"}.get(field.name, "word")


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_field_is_a_flag_with_help_and_a_rule_for_resuming(method):
    parser = make_parser(method)
    text = " ".join(parser.format_help().split())
    for name, field in fields_of(method).items():
        assert field.metadata["help"], name
        assert field.metadata["resume"] in ("fatal", "warn", "free"), name
        assert "--" + name.replace("_", "-") in text
        kind = Config if name in {f.name for f in dataclasses.fields(Config)} else METHOD_CONFIGS[method]
        value = example(field, kind)
        parsed = vars(parser.parse_args(["--" + name.replace("_", "-"), value]))
        assert parsed.keys() == {name}
        assert parsed[name] != field.default, name
        assert type(parsed[name]).__name__ in str(field.type), name


def test_defaults_are_the_published_recipe_of_one_step_sdxl():
    """The one-step SDXL cold start, as published."""
    settings = parse([])
    run, method = settings.run, settings.method
    assert isinstance(method, DMDRConfig)
    assert (run.resolution, run.sample_num_steps, run.shift, run.batch_size) == ("1024", 1, 1.0, 8)
    assert (run.learning_rate_gen, method.learning_rate_gui, method.cfg_r, method.cfg_f) == (1e-7, 1e-7, 7.0, 1.0)
    assert (run.lora_rank, method.lora_scale_f, method.lora_scale_r, run.use_lora_gen) == (32, 2.0, 0.5, False)
    assert (method.ratio_update, method.dynamic_step, method.s_type_gen, method.s_type_gui) == (
        5,
        0,
        "uniform",
        "uniform",
    )
    assert (method.gen_a, method.gen_b, method.gui_a, method.gui_b) == (1, 1, 4, 1.5)
    assert (run.mixed_precision, run.seed, run.max_grad_norm, run.adam_weight_decay) == ("fp16", 30, 1.0, 0.01)
    assert (run.adam_beta1, run.adam_beta2, run.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (method.reward_clip_weight, method.reward_hps_weight, method.reward_margin) == (0.3, 0.3, 0.7)
    assert (run.sample_steps, run.checkpoint_steps, method.magic_prompt) == (100, 500, "Realistic photo")
    assert method.cold_start_iter >= run.max_train_steps  # no rewards without a reward model


# -- YAML ------------------------------------------------------------------------------------------------------------


def settings_file(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_yaml_gives_defaults_and_flags_win(tmp_path):
    file = settings_file(
        tmp_path,
        "batch_size: 3\ntrain-batch-size: 5\nlearning_rate_gen: 1e-5\nuse_lora_gen: true\nvae: null\nratio_update: 2\n",
    )
    settings = parse(["--config", file])
    assert (settings.run.batch_size, settings.run.learning_rate_gen, settings.run.use_lora_gen) == (5, 1e-5, True)
    assert (settings.run.vae, settings.method.ratio_update) == (None, 2)
    assert parse(["--batch-size", "7", f"--config={file}"]).run.batch_size == 7


def test_yaml_may_choose_the_method(tmp_path):
    file = settings_file(tmp_path, "method: sft\ncaption_dropout: 0.2\n")
    assert parse(["--config", file]).method.caption_dropout == 0.2
    assert parse(["--config", settings_file(tmp_path, "method: sft\n"), "--method", "ode"]).run.method == "ode"
    assert parse(["--config", settings_file(tmp_path, "")]) == dataclasses.replace(
        parse([]), run=dataclasses.replace(Config(), config=str(tmp_path / "settings.yaml"))
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n- b\n", "not a mapping"),
        ("3: 4\n", "not a mapping"),
        ("a: [1\n", "cannot be read"),
        (b"\xff\xfe\x00a", "cannot be read"),
        ("batch_size: many\n", "batch-size"),
        ("batch_size: 0\n", "--batch-size 0"),
        ("batchsize: 2\n", "--batchsize"),
        ("method: magic\n", "--method magic"),
        ("!!python/object/apply:os.system ['touch executed']\n", "cannot be read"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        parse(["--config", settings_file(tmp_path, text)])
    assert told in caught.value.message
    assert not (tmp_path / "executed").exists()


def test_a_yaml_file_that_is_not_there():
    with pytest.raises(UserError, match="nowhere"):
        parse(["--config", "nowhere.yaml"])


DRY_RUNS = [
    ["--method", "sft", "--lr-scheduler", "cosine", "--exp-name", "naïve: 1", "--resolution", "64x32", "--seed", "3"],
    ["--method", "ode", "--use-lora-gen", "--sample-num-steps", "4", "--shift", "2.5", "--adam-epsilon", "1e-12"],
    ["--hpsv2-reward-model", "a b", "--magic-prompt=", "--negative-prompt", "- no: 'x'", "--exp-name", "null"],
]


@pytest.mark.parametrize("flags", DRY_RUNS, ids=["sft", "ode", "dmdr"])
def test_a_dry_run_prints_the_settings_of_the_same_run(tmp_path, capsys, flags):
    """The printout, given as --config, trains what was rehearsed."""
    assert main(["train", *flags, "--dry-run"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert not {"dry_run", "config"} & yaml.safe_load(printed).keys()
    file = settings_file(tmp_path, printed)
    expected = parse(flags)
    assert parse(["--config", file]) == dataclasses.replace(
        expected, run=dataclasses.replace(expected.run, config=file)
    )
    assert main(["train", "--config", file, "--dry-run"]) == EXIT_DONE
    assert capsys.readouterr().out == printed


def test_settings_survive_a_checkpoint():
    for method in METHOD_NAMES:
        settings = parse(["--method", method, "--resolution", "64x32"])
        stored = json.loads(json.dumps(settings.as_dict()))
        assert Settings.from_dict(stored | {"gone": 1}) == settings
        assert settings.size_px == (32, 64)


# -- without the heavy packages --------------------------------------------------------------------------------------


def test_help_and_mistakes_are_answered_before_torch_loads(tmp_path):
    program = """
import sys, json
from train_t2i.__main__ import main
codes = []
for arguments in ([], ["--help"], ["train", "--help"], ["train", "--method", "sft", "-h"], ["train", "--dry-run"],
                  ["train", "--lora-rank", "x"], ["train", "--batch-size", "0"], ["nothing"]):
    try:
        codes.append(main(arguments))
    except SystemExit as stop:
        codes.append(stop.code)
heavy = {"torch", "diffusers", "transformers", "accelerate", "open_clip", "peft", "wandb", "numpy", "PIL"}
print("RESULT", json.dumps([codes, sorted(heavy & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == [[2, 0, 0, 0, 0, 2, 2, 2], []]
    assert "Traceback" not in done.stderr
    assert "--caption-dropout" in done.stdout
    assert "usage: python -m train_t2i VERB" in done.stdout


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
    "--dmd-weight -1", "--batch-size-test 0", "--teacher-num-steps 0", "--teacher-cfg 0",
    "--mixed-precision fp8", "--layout pair", "--method magic", "--model-family sd3", "--s-type-gui normal",
    "--lr-scheduler linear", "--use-lora-gen maybe", "--report-to nowhere", "--report-to ''",
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
    ("--method ode --cfg-r 3", "--method dmdr"),
    ("--layout shared", "--use-lora-gen"),
    ("--layout paired --use-lora-gen", "--use-lora-gen"),
    ("--layout shared --use-lora-gen --generator-init x", "--layout paired_lora"),
    ("--layout shared --use-lora-gen --xl-ode-pretrain-path x", "--xl-ode-pretrain-path"),
    ("--generator-init x --xl-ode-pretrain-path y", "give one"),
    ("--xl-ode-pretrain-path x --sample-num-steps 4", "one-step student"),
    ("--layout separate --sample-num-steps 4 --dynamic-step 5", "--lora-scale-r 0"),
    ("--sample-num-steps 4 --s-type-gen beta --gen-a 0", "--gen-a"),
    ("--s-type-gui beta --gui-a -1", "--gui-a"),
    ("--method ode --num-workers 2", "--num-workers does nothing for --method ode"),
    ("--dataloader_num_workers 2", "--num-workers does nothing for --method dmdr"),
    ("--cold-start-iter 10", "--clip-reward-model"),
    ("--cold-start-iter 10 --reward-clip-weight 0", "no reward model"),
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
    assert run_of(f"--exp-name={name}").exp_name == name


# -- flags that act only beside others -------------------------------------------------------------------------------

FEW = "--sample-num-steps 4"
INERT = [  # the flag, beside what it does nothing, beside what it acts
    ("--sample-num-steps 4", "--method sft", ["", "--method ode"]),
    ("--shift 3", "", [FEW, f"--method ode {FEW}"]),
    ("--shift 3", "--method sft", []),
    ("--lora-rank 8", "--method ode", ["--method ode --use-lora-gen", ""]),
    ("--lora-rank 8", "--method sft", ["--method sft --use-lora-gen", "--use-lora-gen"]),
    ("--lora-rank 8", "--layout separate", ["--layout paired"]),
    ("--tiny-vae x", "--method ode", ["--clip-reward-model x"]),
    ("--tiny-vae x", "--method sft", ["--hpsv2-reward-model x --reward-hps-weight 0"]),
    ("--tiny-vae x", "", ["--clip-reward-model x --cold-start-iter 3000"]),
    ("--teacher-cfg 3", "--method ode", ["", "--method sft", "--sample-steps 0"]),
    ("--teacher-num-steps 9", "--method ode", ["", "--method sft"]),
    ("--lora-scale-f 1", "--layout separate", ["", "--use-lora-gen", "--dmd-weight 0 --clip-reward-model x"]),
    ("--lora-scale-r 0.3", "", [f"{FEW} --dynamic-step 5"]),
    ("--lora-scale-r 0", FEW, [f"{FEW} --dynamic-step 5 --s-type-gui beta"]),
    ("--dynamic-step 5", "", [FEW]),
    ("--dynamic-step 5", f"{FEW} --lora-scale-r 0 --s-type-gui logit_normal", [f"{FEW} --lora-scale-r 0 --s-type-gen beta"]),
    ("--s-type-gen beta", "", [FEW]),
    ("--gen-a 3", FEW, [f"{FEW} --s-type-gen beta"]),
    ("--gen-b 3", FEW, [f"{FEW} --s-type-gen logit_normal"]),
    ("--gui-a 3", "", ["--s-type-gui beta"]),
    ("--gui-b 3", "", ["--s-type-gui logit_normal"]),
    ("--negative-prompt x", "--cfg-r 1 --teacher-cfg 1", ["", "--cfg-r 1", "--cfg-r 1 --cfg-f 2 --teacher-cfg 1"]),
    ("--negative-prompt x", "--cfg-r 1 --sample-steps 0", ["--sample-steps 0"]),
    ("--reward-clip-weight 1", "--hpsv2-reward-model x", ["--clip-reward-model x"]),
    ("--reward-hps-weight 1", "", ["--hpsv2-reward-model x"]),
    ("--reward-clip-weight 0 --reward-hps-weight 1", "", ["--hpsv2-reward-model x"]),
    ("--reward-margin 1", "--reward-clip-weight 0 --reward-hps-weight 0", ["--clip-reward-model x"]),
    ("--magic-prompt x", "--clip-reward-model x", ["--hpsv2-reward-model x"]),
    ("--magic-prompt=", "", ["--hpsv2-reward-model x"]),
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
    parse([f"--{name}={field.default}" for name, field in fields.items() if name != "method"] + ["--method", method])


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ("", "paired"), ("--use-lora-gen", "shared"), ("--use-lora-gen --generator-init x", "paired_lora"),
        ("--use-lora-gen --xl-ode-pretrain-path x", "paired_lora"), ("--layout separate", "separate"),
    ],
)  # fmt: skip
def test_the_layout_that_auto_stands_for(flags, layout):
    from train_t2i.config import resolved_layout

    assert resolved_layout(run_of(*flags.split())) == layout


def test_every_layout_can_be_chosen_and_timed():
    from train_t2i.benchmark import BenchmarkConfig
    from train_t2i.networks import LAYOUTS

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


# -- files that cannot be used, before any model loads ---------------------------------------------------------------


@pytest.fixture
def refused(trainer, monkeypatch):
    """The one error line of a run that must not get as far as loading a model."""

    def run(more: str, method: str = "dmdr", *, loads: bool = False, hint: str = "hint: ") -> str:
        if not loads:
            monkeypatch.setattr("train_t2i.build.build_family", lambda *args: pytest.fail("a model was loaded"))
        ended = trainer.ends("run", more, method)
        assert ended.code == EXIT_USER, ended.err
        assert "Traceback" not in ended.err
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, ended.err
        assert hint in ended.err
        return lines[0]

    return run


PROMPT_FILES = {
    "missing.txt": (None, "missing.txt"),
    "empty.txt": (b"", "empty.txt"),
    "blank.txt": (b"\n  \n\t\n", "blank.txt"),
    "latin.txt": (b"a red circle\nna\xefve\n", "latin.txt:2"),
    "nul.txt": (b"a red circle\na\x00b\n", "nul.txt:2"),
    "none.jsonl": (b'{"text": "a"}\n{"words": "b"}\n', "none.jsonl:2"),
    "none.csv": (b"name,age\nx,1\n", "none.csv"),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files(refused, tmp_path, name):
    content, told = PROMPT_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert told in refused(f"--data-path-train {tmp_path / name}")


def test_prompts_of_the_sample_images(refused, tmp_path):
    assert "samples.txt" in refused(f"--sample-prompts {tmp_path / 'samples.txt'} --sample-steps 1")


def test_data_of_the_other_methods(refused, tmp_path, prompts_file):
    assert "not a pairs folder" in refused(f"--data-path-train {tmp_path}", "ode")
    assert "is not a table" in refused(f"--data-path-train {prompts_file}", "sft")


def test_pairs_of_another_size(refused):
    assert "latents of shape (4, 4, 4), this run needs (4, 8, 8)" in refused("--resolution 64", "ode", loads=True)


def test_models(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--pretrained-model {tmp_path / 'empty'}" in refused(f"--pretrained-model {tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists()  # nothing was made for a run that cannot be


@pytest.mark.parametrize("flag", ["--vae", "--tiny-vae", "--generator-init", "--xl-ode-pretrain-path"])
def test_other_weights(refused, tmp_path, towers, flag):
    beside = f"--clip-reward-model {towers['clip']}" if flag == "--tiny-vae" else ""
    told = refused(f"{beside} {flag} {tmp_path / 'absent'}", loads="vae" in flag)
    assert f"{flag} {tmp_path / 'absent'}" in told


class Canary:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['CANARY']}",)


@pytest.mark.parametrize("flag", ["--clip-reward-model", "--hpsv2-reward-model"])
@pytest.mark.parametrize("kind", ["absent", "empty", "truncated", "pickle", "another shape", "text"])
def test_reward_files_are_checked_even_if_never_reached(refused, tmp_path, towers, monkeypatch, flag, kind):
    monkeypatch.setenv("CANARY", str(tmp_path / "executed"))
    folder = towers["clip" if "clip" in flag else "hpsv2"]
    whole = (folder / "open_clip_model.safetensors").read_bytes()
    buffer = io.BytesIO()
    torch.save({"state_dict": Canary()} if kind == "pickle" else {"weight": torch.zeros(3)}, buffer)
    content = {
        "empty": b"", "truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>",
        "pickle": buffer.getvalue(), "another shape": buffer.getvalue(),
    }  # fmt: skip
    path = tmp_path / ("tower.safetensors" if kind in ("empty", "truncated") else "tower.pt")
    if kind != "absent":
        path.write_bytes(content[kind])
    assert str(path) in refused(f"{flag} {path} --cold-start-iter 1000", hint="; ")  # the way out is in the line
    assert not (tmp_path / "executed").exists()


def test_checkpoints(refused, tmp_path):
    assert "no such file" in refused(f"--resume-ckpt {tmp_path / 'step-3.pt'}")
    assert "no complete checkpoint" in refused("--resume-ckpt latest")
    foreign = tmp_path / "elsewhere.pt"
    foreign.write_bytes(b"x")
    assert str(foreign) in refused(f"--resume-ckpt {foreign}")
    inside = tmp_path / "other" / "checkpoints" / "torch_units" / "step-3.pt"
    inside.parent.mkdir(parents=True)
    torch.save({"state": Canary.__name__}, inside)
    assert "is damaged, or not a checkpoint" in refused(f"--resume-ckpt {inside}")


def test_output_folders(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(f"--output-dir {tmp_path / 'file'}")
    (tmp_path / "taken").write_text("")
    assert str(tmp_path / "taken") in refused("--exp-name taken")
    assert "/proc/nothing" in refused("--output-dir /proc/nothing")


def test_a_resolution_that_the_vae_cannot_take(refused, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,) * 5, down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=1, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    assert "--resolution 40x40: the VAE takes multiples of 16" in refused(
        f"--vae {tmp_path / 'vae'} --resolution 40", loads=True
    )
