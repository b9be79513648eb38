"""Command lines of VideoX-Fun's Qwen-Image-Edit training: every flag, as data, and the scripts that take them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import yaml

from train_t2i import entries
from train_t2i.checkpoint import RunFolder
from train_t2i.cli import parse
from train_t2i.config import fields_of
from train_t2i.entries import bf16_export, checkpoint_of, run_folder, translate
from train_t2i.errors import UserError

ROOT = Path(__file__).parents[1]
NEEDED = ["--pretrained_model_name_or_path=model", "--train_data_meta=meta.json", "--output_dir=runs/first"]
# what the four published launches share
PUBLISHED = [
    "--pretrained_model_name_or_path=models/Diffusion_Transformer/Qwen-Image", "--train_data_dir=datasets/internal_datasets/",
    "--train_data_meta=datasets/internal_datasets/metadata.json", "--train_batch_size=1", "--image_sample_size=1024",
    "--gradient_accumulation_steps=1", "--dataloader_num_workers=8", "--num_train_epochs=100", "--checkpointing_steps=50",
    "--learning_rate=2e-05", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=100", "--seed=42",
    "--output_dir=output_dir", "--gradient_checkpointing", "--mixed_precision=bf16", "--adam_weight_decay=3e-2",
    "--adam_epsilon=1e-10", "--vae_mini_batch=1", "--max_grad_norm=0.05", "--enable_bucket", "--uniform_sampling",
    "--trainable_modules", ".", "--train_mode", "qwen_image_edit",
]  # fmt: skip


def settings_of(*arguments: str, environ: dict[str, str] | None = None):
    translated, told = translate([*NEEDED, *arguments], environ or {})
    settings = parse(translated)
    return settings.run, settings.method, told


def test_the_published_line() -> None:
    translated, told = translate(PUBLISHED, {"ACCELERATE_MIXED_PRECISION": "no"})
    settings = parse(translated)
    run, method = settings.run, settings.method
    assert told == []
    assert (run.method, run.model_family, run.shift) == ("sft", "qwen_image_edit", 0)
    assert (run.pretrained_model, run.train_data_dir) == (
        "models/Diffusion_Transformer/Qwen-Image",
        "datasets/internal_datasets/",
    )
    assert run.data_path_train == "datasets/internal_datasets/metadata.json"
    assert (run.batch_size, run.resolution, run.gradient_accumulation_steps, run.num_workers) == (1, "1024", 1, 8)
    assert (run.num_train_epochs, run.checkpoint_steps, run.seed) == (100, 50, 42)
    assert (run.learning_rate_gen, run.lr_scheduler, run.lr_warmup_steps) == (2e-5, "constant_with_warmup", 100)
    assert (run.output_dir, run.exp_name) == (".", "output_dir")
    assert (run.gradient_checkpointing, run.mixed_precision, run.use_lora_gen) == (True, "bf16", False)
    assert (run.adam_weight_decay, run.adam_epsilon, run.max_grad_norm) == (3e-2, 1e-10, 0.05)
    assert (method.vae_mini_batch, method.enable_bucket, method.uniform_sampling) == (1, True, True)
    assert (method.trainable_modules, method.random_hw_adapt, method.ema_decay) == (".", False, 0)


def test_the_tables_name_settings_and_no_flag_twice() -> None:
    ours = {*entries.VALUES.values(), *(name for name, _ in entries.SWITCHES.values()), *entries.LISTS.values()}
    assert (ours | entries.DEFAULTS.keys()) <= fields_of("sft").keys()
    tables = (entries.VALUES, entries.SWITCHES, entries.LISTS, entries.FIXED, entries.DEAD, entries.REFUSED)
    names = [*entries.OWN, *(name for table in tables for name in table)]
    assert len(names) == len(set(names))


VALUE = {
    "train_mode": "qwen_image_edit_plus", "lr_scheduler": "cosine", "mixed_precision": "fp16", "report_to": "wandb",
    "weighting_scheme": "logit_normal", "image_sample_size": "768", "adam_beta1": "0.5", "adam_beta2": "0.5",
    "max_train_steps": "7",
}  # fmt: skip
BESIDE = {
    "logit_mean": ["--weighting_scheme=logit_normal"],
    "logit_std": ["--weighting_scheme=logit_normal"],
    "mode_scale": ["--weighting_scheme=mode"],
    "random_hw_adapt": ["--enable_bucket", "--image_sample_size=1024"],
    "lr_warmup_steps": ["--lr_scheduler=linear"],
    "trainable_modules_low_learning_rate": ["--trainable_modules=a"],
}


@pytest.mark.parametrize("name", entries.VALUES)
@pytest.mark.parametrize("form", ["--{}=", "--{}"])
def test_every_value_arrives(name: str, form: str) -> None:
    ours = entries.VALUES[name]
    value = VALUE.get(name) or ("3" if fields_of("sft")[ours].type in ("int", "float") else "word")
    flag = form.format(name)
    words = [flag + value] if flag.endswith("=") else [flag.replace("_", "-"), value]
    run, method, told = settings_of(*BESIDE.get(name, []), *words)
    found = getattr(run, ours) if ours in {*run.__dataclass_fields__} else getattr(method, ours)
    assert found == type(found)(value)
    assert told == []


@pytest.mark.parametrize("name", entries.SWITCHES)
def test_every_switch_switches(name: str) -> None:
    ours, value = entries.SWITCHES[name]
    for words, expected in (([f"--{name}"], value), ([f"--{name}", "false"], None), ([], None)):
        run, method, _ = settings_of(*BESIDE.get(name, []), *words)
        found = getattr(run, ours) if ours in {*run.__dataclass_fields__} else getattr(method, ours)
        default = fields_of("sft")[ours].default
        assert found == (default if expected is None else (True if value == "on" else float(value)))


def test_lists_become_one_word() -> None:
    _, method, _ = settings_of(
        "--trainable_modules", "attn", "norm", "--trainable_modules_low_learning_rate", "img_mlp"
    )
    assert (method.trainable_modules, method.trainable_modules_low_learning_rate) == ("attn,norm", "img_mlp")


@pytest.mark.parametrize("name", entries.DEAD)
def test_a_dead_flag_is_told_and_left_out(name: str) -> None:
    for words in ([f"--{name}"], [f"--{name}", "word"], [f"--{name}=word"]):
        run, method, told = settings_of(*words)
        assert (run, method) == settings_of()[:2]
        assert len(told) == 1
        assert told[0].startswith(f"--{name} ")
        assert told[0].endswith(": left out")


@pytest.mark.parametrize("name", entries.REFUSED)
def test_what_is_not_done_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is not taken here") as caught:
        translate([*NEEDED, f"--{name}", "1"], {})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train_batch_sise=1"], "--train-batch-sise: unknown flag"),
        (["--learning-rate-gui", "1"], "--learning-rate-gui: unknown flag"),  # of another method
        (["-x"], "-x: unknown flag"),
        (["--train_mode=qwen_edit"], "--train_mode qwen_edit: unknown"),
        (["--train_sampling_steps=500"], "--train_sampling_steps 500: it is 1000 here"),
    ],
)
def test_what_cannot_be_meant(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        translate([*NEEDED, *words], {})
    assert caught.value.hint


@pytest.mark.parametrize("missing", NEEDED)
def test_what_cannot_be_done_without(missing: str) -> None:
    with pytest.raises(UserError, match=missing.partition("=")[0]):
        translate([word for word in NEEDED if word != missing], {})


def test_defaults_are_train_edits() -> None:
    run, _, _ = settings_of()
    assert (run.batch_size, run.resolution, run.learning_rate_gen, run.num_workers) == (1, "512", 1e-4, 0)
    assert (run.lr_scheduler, run.lr_warmup_steps, run.num_train_epochs, run.max_grad_norm) == ("constant", 0, 100, 1)
    assert (run.adam_weight_decay, run.adam_epsilon, run.checkpoint_steps, run.sample_steps) == (1e-2, 1e-8, 500, 0)
    assert run.mixed_precision == "no"
    assert settings_of(environ={"ACCELERATE_MIXED_PRECISION": "bf16"})[0].mixed_precision == "bf16"
    assert settings_of("--lr_scheduler=constant_with_warmup")[0].lr_warmup_steps == 500


def test_steps_win_over_epochs() -> None:
    run, _, _ = settings_of("--num_train_epochs=3", "--max_train_steps=7")
    assert (run.num_train_epochs, run.max_train_steps) == (0, 7)


def test_a_constant_rate_has_no_warm_up() -> None:
    run, _, told = settings_of("--lr_warmup_steps=5")
    assert run.lr_warmup_steps == 0
    assert len(told) == 1


def test_flags_of_the_trainer_are_taken_and_win() -> None:
    run, method, _ = settings_of(
        "--sample-steps",
        "5",
        "--caption_dropout=0.2",
        "--num-workers=3",
        "--logit-mean",
        "-1",
        "--weighting_scheme=logit_normal",
    )
    assert (run.sample_steps, run.num_workers, method.caption_dropout, method.logit_mean) == (5, 3, 0.2, -1)


@pytest.mark.parametrize(
    ("folder", "parent", "name"),
    [("output_dir", ".", "output_dir"), ("a/b/", "a", "b"), ("/a/b", "/a", "b"), ("./c", ".", "c")],
)
def test_their_folder_is_the_runs_own(folder: str, parent: str, name: str) -> None:
    assert run_folder(folder) == {"output_dir": parent, "exp_name": name}


def test_this_folder_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder(".") == {"output_dir": str(tmp_path.parent), "exp_name": tmp_path.name}
    assert run_folder("..") == {"output_dir": str(tmp_path.parent.parent), "exp_name": tmp_path.parent.name}


@pytest.mark.parametrize(
    ("given", "root", "step"),
    [
        ("runs/first/checkpoint-50", "runs/first", 50),
        ("other/checkpoint-7/", "other", 7),
        ("checkpoint-50", "runs/first", 50),
    ],
)
def test_a_checkpoint_is_named_as_there(given: str, root: str, step: int) -> None:
    assert checkpoint_of(given, "runs/first") == RunFolder(Path(root)).record(step)
    run, _, _ = settings_of(f"--resume_from_checkpoint={given}")
    assert run.resume_ckpt == str(RunFolder(Path(root)).record(step))


def test_the_latest_checkpoint_is_looked_for() -> None:
    run, _, _ = settings_of("--resume_from_checkpoint", "latest")
    assert (run.auto_resume, run.resume_ckpt) == (True, None)
    record = str(RunFolder(Path("a")).record(3))
    assert settings_of(f"--resume_from_checkpoint={record}")[0].resume_ckpt == record


def script(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *arguments], cwd=cwd, env=clean, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


def test_the_script_runs_from_anywhere_and_prints_its_settings(tmp_path: Path) -> None:
    done = script("qwenimage/train_edit.py", *PUBLISHED, "--noise_offset=0.1", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["learning_rate_gen"] == 2e-5
    assert "--noise_offset did nothing in train_edit.py: left out" in done.stderr
    assert (
        "--noise_offset"
        not in script(
            "qwenimage/train_edit.py", *PUBLISHED, "--noise_offset=0.1", "--dry-run", cwd=tmp_path, RANK="1"
        ).stderr
    )
    wrong = script("qwenimage/train_edit.py", *PUBLISHED, "--low_vram", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[0] == "error: --low_vram is not taken here"


# -- zero_to_bf16.py -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised(tmp_path_factory, sdxl_folder, images_table) -> Path:
    root = tmp_path_factory.mktemp("supervised")
    return tiny_runs.train(root, "output_dir", "--sample-steps 0", "sft", model=sdxl_folder, prompts=images_table)


def test_a_checkpoint_becomes_a_bf16_folder(supervised: Path, tmp_path: Path) -> None:
    """The published line, with the folder that it names inside the run's."""
    import json

    import torch
    from safetensors.torch import load_file

    line = "output_dir/checkpoint-1 output_dir/checkpoint-1-outputs --max_shard_size 80GB --safe_serialization"
    done = script("zero_to_bf16.py", *line.split(), cwd=supervised.parent)
    assert done.returncode == 0, done.stderr
    folder = supervised / "checkpoint-1-outputs"
    saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for key, master in tiny_runs.weights(supervised, 1).items():
        assert torch.equal(saved[key], master.to(torch.bfloat16))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    assert RunFolder(supervised).steps() == [2, 1]  # the outputs are no checkpoint
    assert "already there" in script("zero_to_bf16.py", *line.split(), cwd=supervised.parent).stderr


def test_a_record_and_a_run_are_taken(supervised: Path) -> None:
    assert bf16_export([str(supervised), "o"])[0][0] == str(supervised)
    record = str(RunFolder(supervised).record(2))
    arguments, told = bf16_export([record, "o", "--max_shard_size=1GB", "-t", "global_step2", "-d"])
    assert arguments == [record, "--out=o", "--dtype=bf16", "--max-shard-size=1GB"]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["checkpoint-9", "o"], "there is: checkpoint-1, checkpoint-2"),
        (["checkpoint-1", "o", "--exclude_frozen_parameters"], "--exclude_frozen_parameters is not taken here"),
        (["checkpoint-1", "o", "--safe_serialization", "false"], "pickles are not written"),
        (["checkpoint-1"], "required: out"),
        (["checkpoint-1", "o", "--what"], "--what"),
    ],
)
def test_what_zero_to_bf16_refuses(
    supervised: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(supervised)
    with pytest.raises(UserError) as caught:
        bf16_export([f"{supervised}/{words[0]}", *words[1:]])
    assert told in str(caught.value)
