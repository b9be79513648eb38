"""Every method on an edit model: rows of one and of two sources, sampled, scored, exported; what makes no sense is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from edit_models import load_edit, save_edit, save_edits
from PIL import Image
from test_edit_families import with_token_types
from tiny_runs import weights

from train_t2i.__main__ import main
from train_t2i.families.flow import pack
from train_t2i.randomness import seeded_noise
from train_t2i.student import load_student

SIDE = 64
EDIT = "--resolution 64 --source-size 64 --source-seen-size 64 --mixed-precision no"
METHODS = {
    "dmdr": "--use-lora-gen --sample-num-steps 2 --sample-type ode --teacher-cfg 3 --teacher-num-steps 2",
    "direct": "--use-lora-gen --lora-rank 2 --sample-num-steps 2 --sample-type ode",
    "arcflow": "--use-lora-gen --lora-rank 2 --sample-num-steps 2 --shift 3.2 --num-components 3 --mixing-steps 2 --distill-cfg 3 --teacher-num-steps 2",
    "sft": "--caption-dropout 0.5 --cache-rows on",
}


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_edit(tmp_path_factory.mktemp("edit") / "plus", "qwen_image_edit_plus")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_edits(tmp_path_factory.mktemp("edits"), several=True)


@pytest.fixture(scope="module")
def pairs(plus: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "pairs"
    flags = f"--out {out} --pretrained-model {plus} --data-path-train {table} --count 6 --num-inference-steps 2 --cfg-scale 2"
    assert main(["pairs", *flags.split(), *EDIT.split()]) == 0
    return out


def flags_for(method: str, plus: Path, table: Path, pairs: Path) -> str:
    data = pairs if method == "direct" else table
    workers = " --num-workers 0"
    return f"--pretrained-model {plus} --data-path-train {data} {EDIT} {METHODS[method]}{workers}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_an_edit_model(method: str, trainer: Any, plus: Path, table: Path, pairs: Path) -> None:
    """Two steps, sheets of what is edited and made; stopped after the first, the same as in one go."""
    flags = f"{flags_for(method, plus, table, pairs)} --max-train-steps 2 --checkpoint-steps 1 --sample-steps 2"
    whole = trainer.run("whole", flags, method)
    losses = [line["loss"] for line in tiny.log_lines(whole)]
    assert all(loss > 0 for loss in losses)
    assert not all(
        torch.equal(a, b) for a, b in zip(weights(whole, 1).values(), weights(whole, 2).values(), strict=True)
    )
    part = trainer.run("part", f"{flags} --max-train-steps 1", method)
    assert trainer.run("part", f"{flags} --auto-resume", method) == part
    tiny.assert_same_checkpoint(whole, part, 2)
    with Image.open(whole / "samples" / "step 2" / "grid.png") as grid:
        has_teacher = method in ("dmdr", "arcflow")
        assert grid.height >= SIDE * (2 + has_teacher)  # sources, the student, the teacher


def test_an_edit_is_sampled_scored_and_exported(
    trainer: Any, plus: Path, table: Path, pairs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Images are functions of prompt, sources and seed; the stock pipeline makes the exported student's."""
    run = trainer.run("run", f"{flags_for('dmdr', plus, table, pairs)} --max-train-steps 2 --cfg-r 3 --shift 3", "dmdr")
    assert main(["sample", str(run), "--prompts", str(table), "--count", "4", "--out", str(tmp_path / "four")]) == 0
    rows = json.loads(table.read_text())
    sources = [str(table.parent / name) for name in rows[1]["source_file_path"]]
    assert len(sources) == 2
    alone = ["--prompt", rows[1]["text"], "--seed", "1", "--count", "1", "--out", str(tmp_path / "one")]
    assert main(["sample", str(run), *alone, "--source", sources[0], "--source", sources[1]]) == 0
    one, same = (Image.open(tmp_path / name).tobytes() for name in ("one/00000.png", "four/00001.png"))
    assert one == same
    table_out = tmp_path / "table.json"
    judge = ["--scorer", "edit_models:brightness", "--out", str(table_out), "--side-by-side", str(tmp_path / "page")]
    assert main(["evaluate", str(run), "--prompts", str(table), "--count", "4", "--batch-size", "2", *judge]) == 0
    assert -1 < json.loads(table_out.read_text())[0]["adherence"] < 1
    assert len(list((tmp_path / "page" / "images").glob("00001-source-*.png"))) == 2

    out = tmp_path / "pipeline"
    assert main(["export", str(run), "--out", str(out)]) == 0
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", SIDE**2)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", SIDE**2)
    call = json.loads((out / "recommended.json").read_text())
    noise = seeded_noise([1], (16, SIDE // 8, SIDE // 8))
    images = [Image.open(path).convert("RGB") for path in sources]
    made = with_token_types(load_edit(out, "qwen_image_edit_plus"))(
        images, rows[1]["text"], latents=pack(noise), output_type="pt", **call
    ).images
    asked = load_student(str(run)).images([rows[1]["text"]], [1], [read_sources_of(run, table, 1)])
    torch.testing.assert_close(made, asked, rtol=0, atol=1e-4)


def read_sources_of(run: Path, table: Path, row: int) -> Any:
    from train_t2i.feed import asked_of

    return asked_of(load_student(str(run)).settings, str(table), row + 1)[1][row]


def test_times_follow_the_size_of_each_bucket(trainer: Any, plus: Path, table: Path, pairs: Path) -> None:
    flags = (
        f"{flags_for('sft', plus, table, pairs)} --enable-bucket --shift 0 --uniform-sampling --weighting-scheme cosmap"
    )
    run = trainer.run("run", f"{flags} --vae-mini-batch 1 --cache-rows off --ema-decay 0.9", "sft")
    assert len(tiny.log_lines(run)) == 2


@pytest.mark.parametrize(("flags", "told"), [
    ("--text-length 16", "--text-length does nothing for qwen_image_edit_plus"),
    ("--prompt-cache x", "--prompt-cache: the texts of qwen_image_edit_plus are read beside their sources"),
    ("--model-family qwen_image_edit", "--source-seen-size does nothing"),
])  # fmt: skip
def test_flags_that_an_edit_model_has_no_use_for(
    flags: str, told: str, trainer: Any, plus: Path, table: Path, pairs: Path
) -> None:
    ended = trainer.ends("run", f"{flags_for('dmdr', plus, table, pairs)} {flags}", "dmdr")
    assert ended.code == 2
    assert told in ended.err


def test_two_sources_under_plain_edit_are_refused_with_their_row(
    trainer: Any, plus: Path, table: Path, pairs: Path
) -> None:
    flags = f"{flags_for('sft', plus, table, pairs)} --model-family qwen_image_edit --source-seen-size 384"
    ended = trainer.ends("run", flags, "sft")
    assert ended.code == 2
    assert "metadata.json, row 2: 2 sources in source_file_path, the model takes 1" in ended.err
