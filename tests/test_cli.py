"""Flags: every spelling, every field, YAML, without the heavy packages."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train_t2i.__main__ import main
from train_t2i.cli import ALIASES, make_parser, parse, spelled
from train_t2i.config import METHOD_CONFIGS, METHOD_NAMES, Config, DMDRConfig, Settings, fields_of
from train_t2i.errors import EXIT_DONE, UserError

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
        default = field.default or 0
        number = default + 1 if default + 1 < high else (default or high) / 2
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
    assert parse(["--config", settings_file(tmp_path, "method: sft\n"), "--method", "direct"]).run.method == "direct"
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
    ["--method", "direct", "--use-lora-gen", "--sample-num-steps", "4", "--shift", "2.5", "--adam-epsilon", "1e-12"],
    ["--hpsv2-reward-model", "a b", "--magic-prompt=", "--negative-prompt", "- no: 'x'", "--exp-name", "null"],
]


@pytest.mark.parametrize("flags", DRY_RUNS, ids=["sft", "direct", "dmdr"])
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
        settings = parse(["--method", method, "--resolution", "64x32", "--use-lora-gen"])
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
