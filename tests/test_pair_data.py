"""Tables of the teacher's images: DiffSynth-Studio's own format, what is refused, and batches of one size each."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tiny
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from tiny_runs import stopped_at
from torch import Tensor
from trainer import Trainer

from train_t2i.errors import EXIT_USER, UserError
from train_t2i.families import load_family
from train_t2i.feed import Feed
from train_t2i.pair_data import ImagePairs, Wanted, open_pairs
from train_t2i.randomness import seeded_noise

PROMPT = "精致肖像，水下少女，蓝裙飘逸，发丝轻扬，光影透澈，气泡环绕，面容恬静，细节精致，梦幻唯美。"
HEADER = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale"
SIZE = (32, 32)
FIXED = Wanted(SIZE)


def save_image(path: Path, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The sample of DiffSynth-Studio's documentation, with an image of our own."""
    save_image(tmp_path / "distill_qwen" / "image.png")
    path = tmp_path / "metadata.csv"
    path.write_text(f'{HEADER}\ndistill_qwen/image.png,"{PROMPT}",0,cpu,4,1\n', encoding="utf-8")
    return path


def test_the_sample_row_of_the_documentation_is_read_as_it_is(table):
    data = open_pairs(str(table), Wanted(SIZE, max_row_steps=8))
    item = data[0]
    assert len(data) == 1
    assert (item["prompt"], item["seed"], item["rand_device"], item["num_steps"]) == (PROMPT, 0, "cpu", 4)
    pixels = torch.from_numpy(np.array(Image.open(table.parent / "distill_qwen" / "image.png")))
    assert torch.equal(item["images"], pixels.permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_json_and_parquet_hold_the_same(table, suffix):
    with open(table, encoding="utf-8", newline="") as file:
        rows = [row | {"seed": int(row["seed"]), "num_inference_steps": 4} for row in csv.DictReader(file)]
    path = table.with_suffix(suffix)
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    first, second = (open_pairs(str(p), Wanted(SIZE))[0] for p in (table, path))
    assert torch.equal(first.pop("images"), second.pop("images"))
    assert first == second


def refused(path: Path, wanted: Wanted = FIXED, multiple: int = 8) -> str:
    with pytest.raises(UserError) as told:
        open_pairs(str(path), wanted).settle((4, 4, 4), multiple, torch.tensor([0.399, 0.0]))
    assert told.value.exit_code == EXIT_USER
    return str(told.value)


BAD_ROWS = {
    "no seed": ("distill_qwen/image.png,a,,cpu,4,1", "metadata.csv:3: seed is ''"),
    "a seed that is no number": ("distill_qwen/image.png,a,0.5,cpu,4,1", "metadata.csv:3: seed is '0.5'"),
    "a negative seed": ("distill_qwen/image.png,a,-1,cpu,4,1", "metadata.csv:3: seed is '-1'"),
    "noise of a device that is not here": ("distill_qwen/image.png,a,1,cuda,4,1", "metadata.csv:3: its noise was drawn on cuda"),
    "noise of nowhere": ("distill_qwen/image.png,a,1,mps,4,1", "metadata.csv:3: rand_device is 'mps'"),
    "too many steps": ("distill_qwen/image.png,a,1,cpu,9,1", "metadata.csv:3: num_inference_steps is '9', --max-row-steps 8"),
    "no number of steps": ("distill_qwen/image.png,a,1,cpu,,1", "metadata.csv:3: num_inference_steps is ''"),
    "no image": (",a,1,cpu,4,1", "metadata.csv:3: no image"),
    "an image that is not there": ("none.png,a,1,cpu,4,1", "metadata.csv:3: no image none.png"),
    "an image of another size": ("wide.png,a,1,cpu,4,1", "metadata.csv:3: image wide.png has 40x32 pixels, this run 32x32"),
    "no image at all": ("text.png,a,1,cpu,4,1", "metadata.csv:3: image text.png cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_what_would_train_on_something_else_is_refused_with_its_row(table, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row, told = BAD_ROWS[case]
    save_image(table.parent / "wide.png", width=40)
    (table.parent / "text.png").write_text("no image")
    table.write_text(table.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")
    assert told in refused(table, Wanted(SIZE, max_row_steps=8))


@pytest.mark.parametrize("column", ["seed", "prompt"])
def test_a_column_that_is_missing_is_named(table, column):
    with open(table, encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != column} for row in csv.DictReader(file)]
    table.with_suffix(".json").write_text(json.dumps(rows))
    assert f"no column {column}" in refused(table.with_suffix(".json"))


def test_dynamic_sizes_are_neither_scaled_nor_cropped(table):
    assert "more than --max-pixels 1023: it would have to be scaled" in refused(
        table, Wanted((64, 64), max_pixels=1023)
    )
    assert "not multiples of 24: it would have to be cropped" in refused(table, Wanted((64, 64), max_pixels=1024), 24)
    open_pairs(str(table), Wanted((64, 64), max_pixels=1024)).settle((4, 8, 8), 8, torch.tensor([0.399, 0.0]))


def test_noise_of_a_gpu_is_drawn_there(monkeypatch):
    """The column says whose generator; without one at hand, only that it is asked."""
    asked = []
    generator = torch.Generator

    def recorded(device: str) -> torch.Generator:
        asked.append(device)
        return generator("cpu")

    monkeypatch.setattr(torch, "Generator", recorded)
    monkeypatch.setattr(torch, "randn", lambda shape, generator, device: torch.zeros(shape))
    seeded_noise([1, 2], (4, 4, 4), ["cpu", "cuda"])
    assert asked == ["cpu", "cuda"]


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes_table(tmp_path: Path) -> Path:
    """Five images of 32x32, four of 48x32."""
    lines = [HEADER]
    for i in range(9):
        save_image(tmp_path / f"{i}.png", height=32, width=32 if i % 2 == 0 else 48, seed=i)
        lines.append(f"{i}.png,prompt {i},{i},cpu,{1 + i % 3},1")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_batch_has_one_size_however_the_processes_share_it(sizes_table):
    data = ImagePairs(str(sizes_table), Wanted(SIZE, max_pixels=48 * 32))

    def rows_of(**split: int) -> list[list[int]]:
        feed = Feed(data, seed=3, **split)
        ticks = feed.ticks(0)
        return [list(batch.rows) for _ in range(4) for batch in next(ticks)]

    alone = rows_of(batch_size=4)
    assert all(len({data.sizes_px[row] for row in rows}) == 1 for rows in alone)
    halves = [rows_of(batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    assert rows_of(batch_size=2, accumulate=2) == [half for rows in alone for half in (rows[:2], rows[2:])]


def test_a_run_on_images_of_several_sizes_goes_on_bit_for_bit(trainer: Trainer, sizes_table, towers):
    flags = (
        f"--data-path-train {sizes_table} --max-pixels 1536 --max-row-steps 3 --sample-num-steps 2 --sample-type ode "
        f"--num-workers 0 --step-checkpointing --feature-model {towers['clip']} --max-train-steps 4 --checkpoint-steps 2"
    )
    whole = trainer.run("whole", flags, "direct")
    again = trainer.run(stopped_at(whole, 2, "cut").name, f"{flags} --auto-resume", "direct")
    tiny.assert_same_checkpoint(whole, again, 4)
    tiny.assert_same_logs(whole, again)
    (first, *_) = tiny.log_lines(whole)
    assert first["loss"] == pytest.approx(first["loss_latent"] + 0.1 * first["loss_features"], rel=1e-5)


def test_a_run_on_several_sizes_is_split_otherwise_and_stays_the_same(trainer: Trainer, sizes_table):
    """Rows that share a size are as many as the global batch, which a run keeps."""
    flags = f"--data-path-train {sizes_table} --max-pixels 1536 --num-workers 0 --max-train-steps 3"
    whole = trainer.run("whole", f"{flags} --batch-size 4 --checkpoint-steps 1", "direct")
    more = f"{flags} --batch-size 2 --gradient-accumulation-steps 2 --auto-resume"
    again = trainer.run(stopped_at(whole, 1, "cut").name, more, "direct")
    for first, second in zip(tiny.log_lines(whole), tiny.log_lines(again), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_reading_processes_change_nothing(trainer: Trainer, sizes_table):
    flags = f"--data-path-train {sizes_table} --max-pixels 1536 --max-train-steps 2"
    alone = trainer.run("alone", f"{flags} --num-workers 0", "direct")
    shared = trainer.run("shared", f"{flags} --num-workers 2", "direct")
    tiny.assert_same_checkpoint(alone, shared, 2)


def test_images_train_as_their_stored_encodings_do(trainer: Trainer, sdxl_folder, tmp_path):
    family = load_family("auto", str(sdxl_folder))
    images = [save_image(tmp_path / "made" / f"{i}.png", seed=i) for i in range(4)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    rows = [f"{i}.png,prompt {i},{i},cpu,1,1" for i in range(4)]
    (tmp_path / "made" / "table.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "metadata.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (stored / "pairs.json").write_text('{"shard_size": 4}')
    save_file({"latents": encoded(family, pixels)}, stored / "latents-00000.safetensors")
    flags = "--max-train-steps 2 --batch-size 1"
    first = trainer.run(
        "images", f"{flags} --num-workers 0 --data-path-train {tmp_path / 'made' / 'table.csv'}", "direct"
    )
    second = trainer.run("latents", f"{flags} --data-path-train {stored}", "direct")
    losses = [[line["loss"] for line in tiny.log_lines(run)] for run in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def encoded(family, pixels: Tensor) -> Tensor:
    """One by one, as a batch of one is."""
    return torch.cat([family.to_latents(pixels[i : i + 1]) for i in range(len(pixels))]).contiguous()


def test_an_image_that_changed_meanwhile_is_one_line(table):
    data = open_pairs(str(table), Wanted(SIZE))
    save_image(table.parent / "distill_qwen" / "image.png", width=48)
    with pytest.raises(UserError, match="has changed while it was used"):
        data[0]


def test_images_are_not_looked_for_outside_the_tables_folder(table):
    (table.parent / "distill_qwen" / "image.png").rename(table.parent.parent / "image.png")
    table.write_text(f"{HEADER}\n../image.png,a,1,cpu,4,1\n")
    assert "outside" in refused(table)
