"""Training from a prompt cache: the same run as with the text encoders, which are never loaded."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from caches import flip
from diffusers import StableDiffusionXLPipeline
from tiny_runs import record

from train_t2i import build, cache, storage, student
from train_t2i.config import Config
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.families import load_family
from train_t2i.families.sdxl import SDXL
from train_t2i.prompt_cache import CachedText
from train_t2i.text_key import encoder_digest, text_key

ONE = "--batch-size 1 --batch-size-test 1 --sample-steps 1 --teacher-num-steps 2"


@pytest.fixture
def make(sdxl_folder, prompts_file, models_from_memory, monkeypatch, tmp_path):
    """More flags -> a cache of the prompts that the runs are trained on, encoded one by one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def run(more: str = "", name: str = "cache") -> Path:
        common = f"--out {tmp_path / name} --pretrained-model {sdxl_folder} --data-path-train {prompts_file}"
        assert cache.main(shlex.split(f"{common} --mixed-precision no --batch-size 1 --shard-size 16 {more}")) == 0
        return tmp_path / name

    return run


def refused(ended, *words: str) -> None:
    assert ended.code == EXIT_USER, ended.err
    assert "Traceback" not in ended.err
    told = ended.err[ended.err.index("error: ") :]
    assert len(told.splitlines()) <= 2
    assert all(word in told for word in words), told


# -- the same run ----------------------------------------------------------------------------------------------------


def test_a_run_from_the_cache_is_the_run_with_encoders(trainer, make, monkeypatch) -> None:
    """Bit for bit at the same batches: losses, weights, sample images, and after going on."""
    online = trainer.run("online", f"{ONE} --checkpoint-steps 1")
    folder = make()
    monkeypatch.setattr(SDXL, "encode", None)  # whoever calls it now fails
    flags = f"{ONE} --prompt-cache {folder}"
    cached = trainer.run("cached", f"{flags} --checkpoint-steps 1")
    tiny.assert_same_checkpoint(online, cached, 2)
    tiny.assert_same_logs(online, cached)
    for name in ("step 0/grid.png", "step 2/grid.png"):
        assert (online / "samples" / name).read_bytes() == (cached / "samples" / name).read_bytes()
    trainer.run("resumed", f"{flags} --max-train-steps 1")
    resumed = trainer.run("resumed", f"{flags} --auto-resume")
    tiny.assert_same_checkpoint(online, resumed, 2)
    said = (cached / "log.txt").read_text()
    assert "40, 40 different, stored as native" in said
    assert "not compared" not in said


@pytest.mark.parametrize("method", ["sft", "direct"])
def test_other_methods_train_from_a_cache_of_their_tables(trainer, make, images_table, pairs_folder, method) -> None:
    data = {"sft": images_table, "direct": pairs_folder / "metadata.csv"}[method]
    folder = make(f"--data-path-train {data}")
    online = trainer.run("online", "--batch-size 1", method)
    cached = trainer.run("cached", f"--batch-size 1 --prompt-cache {folder}", method)
    tiny.assert_same_checkpoint(online, cached, 2)


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 2**-8), ("fp8", 2**-3)])
def test_smaller_numbers_change_the_losses_a_little(trainer, make, kind: str, bound: float) -> None:
    """By no more than they are rounded: 2**-9 and 2**-4 of an embedding."""
    online = tiny.log_lines(trainer.run("online"), "guidance")
    cached = tiny.log_lines(trainer.run("cached", f"--prompt-cache {make(f'--store {kind}')}"), "guidance")
    for mine, theirs in zip(online, cached, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=bound)
    assert [line["loss"] for line in online] != [line["loss"] for line in cached]


def test_only_the_prompts_of_the_cache_are_trained_on(trainer, make, prompts_file) -> None:
    """--max-size: the last of the data, of which the sample images are the first then."""
    folder = make("--max-size 3")
    cached = trainer.run("run", f"{ONE} --prompt-cache {folder}")
    lines = prompts_file.read_text().splitlines()
    assert (cached / "samples" / "step 0" / "prompts.txt").read_text() == lines[-3] + "\n"
    assert "; 3 rows" in (cached / "log.txt").read_text()


def test_no_encoder_is_in_memory(make, sdxl_folder) -> None:
    run = Config(model_family="sdxl", pretrained_model=str(sdxl_folder), prompt_cache=str(make()), mixed_precision="no")
    family = build.build_family(run, torch.float32)
    assert isinstance(family, CachedText)
    assert family.pipe.text_encoder is None
    assert family.pipe.text_encoder_2 is None
    with pytest.raises(RuntimeError, match="not loaded"):
        family.family.encode(["a"], None)


def test_a_run_from_a_cache_draws_any_prompt_later(trainer, make) -> None:
    """Sampling loads the encoders again: its prompts are new ones."""
    run = trainer.run("run", f"--prompt-cache {make()}")
    assert student.load_student(str(run)).images(["a prompt that no cache holds"], [1]).shape == (1, 3, 32, 32)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_caches_that_do_not_fit_are_refused_before_anything_trains(trainer, make, sdxl_folder_3, tmp_path) -> None:
    folder = make()
    flags = f"--prompt-cache {folder}"
    refused(trainer.ends("a", f"{flags} --pretrained-model {sdxl_folder_3}"), "made with other settings (encoder: then")
    refused(trainer.ends("a", f"{flags} --mixed-precision bf16"), "dtype: then 'float32', now 'bfloat16'")
    refused(trainer.ends("a", f"{flags} --text-length 50"), "--text-length does nothing for sdxl")
    refused(
        trainer.ends("a", f"--prompt-cache {tmp_path / 'none'}"),
        "none: not a prompt cache",
        "python -m train_t2i cache",
    )
    (folder / "shard-00001.safetensors").unlink()
    refused(trainer.ends("a", flags), "not complete", "run the cache command again")


def test_prompts_that_are_not_in_the_cache_are_named_at_the_start(trainer, make, tmp_path, monkeypatch) -> None:
    folder, other = make(), tmp_path / "other.txt"
    flags = f"--prompt-cache {folder}"
    monkeypatch.setattr(build, "build_family", None)  # nothing has been loaded yet
    other.write_text("a horse\n")
    refused(trainer.ends("a", f"{flags} --data-path-train {other}"), "1 of 1 prompts are not in it", "'a horse'")
    refused(trainer.ends("a", f"{flags} --sample-prompts {other} --sample-steps 1"), "'a horse'")
    refused(trainer.ends("a", f"{flags} --negative-prompt ugly"), "'ugly'")


def test_a_damaged_shard_stops_the_run_in_one_line(trainer, make) -> None:
    folder = make()
    for shard in folder.glob("shard-*"):
        flip(shard, -1)
        flip(shard, -5000)
    ended = trainer.ends("a", f"--prompt-cache {folder} --max-train-steps 40 --batch-size 4")
    refused(ended, "is damaged", "run the cache command again")


def test_a_run_is_not_continued_on_data_of_another_length(trainer, make, monkeypatch) -> None:
    """Its samples would come in another order: refused before models load; a stage from another run is free to."""
    run = trainer.run("run", "--batch-size 1 --max-train-steps 1")
    fewer = f"--batch-size 1 --prompt-cache {make('--max-size 3')}"
    with monkeypatch.context() as patched:
        patched.setattr(build, "build_family", None)
        ended = trainer.ends("run", f"{fewer} --auto-resume")
    refused(ended, "its data had 40 rows, now 3", "--prompt-cache", "new --exp-name")
    assert "; 3 rows" in (trainer.run("stage", f"{fewer} --resume-ckpt {record(run, 1)}") / "log.txt").read_text()
    trainer.run("run", f"--batch-size 1 --prompt-cache {make(name='all')} --auto-resume")


def test_a_record_of_an_older_version_does_not_tell_its_rows(trainer, make) -> None:
    run = trainer.run("run", "--batch-size 1 --max-train-steps 1")
    older = storage.read_record(record(run, 1))
    assert older.pop("rows") == 40
    rest = {name: value for name, value in older.items() if name not in ("version", "step", "manifest")}
    record(run, 1).write_bytes(storage.seal(1, older["manifest"], rest))
    trainer.run("run", f"--batch-size 1 --prompt-cache {make('--max-size 3')} --auto-resume")


# -- the key ---------------------------------------------------------------------------------------------------------


def test_encoders_are_told_by_their_numbers(sdxl_folder, sdxl_folder_3, tmp_path) -> None:
    """Not by their files: split, saved again or beside others they are the same; one number more or less, and not."""
    from safetensors.torch import load_file, save_file

    digest = encoder_digest(str(sdxl_folder))
    assert digest is not None
    assert digest != encoder_digest(str(sdxl_folder_3))
    copy = tmp_path / "copy"
    shutil.copytree(sdxl_folder, copy)
    part = copy / "text_encoder"
    weights = load_file(part / "model.safetensors")
    names = sorted(weights)
    (part / "model.safetensors").unlink()
    save_file({name: weights[name] for name in names[::2]}, part / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({name: weights[name] for name in names[1::2]}, part / "model-00002-of-00002.safetensors")
    shutil.rmtree(copy / "unet")
    (part / "pytorch_model.bin").write_bytes(b"another copy")
    assert encoder_digest(str(copy)) == digest
    for name in ("text_encoder_2/model.safetensors", "tokenizer/tokenizer.json"):
        if (copy / name).exists():
            shutil.copy(copy / name, tmp_path / "kept")
            flip(copy / name, -2)
            assert encoder_digest(str(copy)) != digest
            shutil.copy(tmp_path / "kept", copy / name)
    assert encoder_digest(str(copy)) == digest
    shutil.rmtree(copy / "text_encoder")
    shutil.rmtree(copy / "text_encoder_2")
    assert encoder_digest(str(copy)) is None
    assert encoder_digest("nobody/no-such-model") is None


def edited(path: Path, **changes: object) -> None:
    """Settings written in another order and form."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(reversed({**settings, **changes}.items()))))


def test_encoders_are_told_by_their_settings(sdxl_folder, tmp_path) -> None:
    """By each that decides an embedding, and by nothing that only tells who saved them."""
    digest, copy = encoder_digest(str(sdxl_folder)), tmp_path / "copy"
    shutil.copytree(sdxl_folder, copy)
    for name, change in (
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("text_encoder_2/config.json", {"layer_norm_eps": 1e-6}),
        ("text_encoder_2/config.json", {"text_config": {"rope_scaling": {"type": "mrope"}}}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 76}),
        ("tokenizer_2/special_tokens_map.json", {"pad_token": "!"}),
    ):
        edited(copy / name, **change)
        assert encoder_digest(str(copy)) not in (None, digest), name
        (copy / name).unlink()
        if (sdxl_folder / name).exists():
            shutil.copy(sdxl_folder / name, copy / name)
    who = {"transformers_version": "4.40.0", "_name_or_path": "me", "torch_dtype": "float16", "architectures": ["A"]}
    edited(copy / "text_encoder" / "config.json", **who, _diffusers_version="0.20.0")
    edited(copy / "tokenizer" / "tokenizer_config.json", name_or_path="me", is_local=True, chat_template="{{ a }}")
    assert encoder_digest(str(copy)) == digest
    digests = set()
    for told in ({}, who):  # of a part of a model
        edited(copy / "text_encoder_2" / "config.json", text_config={"hidden_size": 24, **told}, parts=[told])
        digests.add(encoder_digest(str(copy)))
    assert len(digests) == 1
    (copy / "text_encoder" / "config.json").write_text('{"hidden_act": ')
    with pytest.raises(UserError, match=r"copy: cannot be read .*get it again"):
        encoder_digest(str(copy))


def test_a_model_that_is_loaded_and_saved_again_is_the_same(sdxl_folder, tmp_path) -> None:
    StableDiffusionXLPipeline.from_pretrained(sdxl_folder).save_pretrained(tmp_path / "again")
    files = [path.relative_to(sdxl_folder) for path in sdxl_folder.glob("t*/*.json")]
    assert any((sdxl_folder / name).read_bytes() != (tmp_path / "again" / name).read_bytes() for name in files)
    assert encoder_digest(str(tmp_path / "again")) == encoder_digest(str(sdxl_folder))


def test_a_model_without_its_encoders_trains_from_a_cache(trainer, make, sdxl_folder, tmp_path) -> None:
    """What cannot be compared is said."""
    copy, folder = tmp_path / "bare", make()
    shutil.copytree(sdxl_folder, copy)
    for part in ("text_encoder", "text_encoder_2"):
        (copy / part / "model.safetensors").unlink()
    run = trainer.run("run", f"--prompt-cache {folder} --pretrained-model {copy}")
    assert "not compared, since its files are not here: encoder" in (run / "log.txt").read_text()


def test_the_key_of_a_family(sdxl_folder) -> None:
    family = load_family("sdxl", str(sdxl_folder))
    key = text_key(family, str(sdxl_folder))
    assert key == {
        "pipeline": "StableDiffusionXLPipeline", "text_length": 77, "template": {}, "zeros_for_empty": True,
        "encoder": encoder_digest(str(sdxl_folder)),
    }  # fmt: skip
