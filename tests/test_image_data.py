"""Batches of images and edits: every row in its turn, one key a batch, the same however processes share the work."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tiny_runs import stopped_at
from trainer import Trainer

from train_t2i.cli import parse
from train_t2i.data import BucketOrder, Order, order_of
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.feed import Feed, dataset_for
from train_t2i.image_data import Images
from train_t2i.methods import Batch
from train_t2i.rows import Rejects, RowRules, load_rows
from train_t2i.sizes import bucket_sizes, nearest, side_divisor

MODEL = ((4, 4, 4), 8, torch.tensor([1.0, 0.0]))  # latent shape, size multiple, grid


# -- order -----------------------------------------------------------------------------------------------------------


@given(
    buckets=st.lists(st.integers(0, 4), min_size=1, max_size=60), size=st.integers(1, 7), seed=st.integers(0, 5),
    epochs=st.integers(1, 6),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_bucket_order_loses_and_doubles_nothing(buckets, size, seed, epochs):
    used = sorted(set(buckets))
    keys = [used.index(bucket) for bucket in buckets]
    order, counts = BucketOrder(keys, size, seed), Counter(keys)
    chunks = sum(epochs * n // size for n in counts.values())
    rows = [order.index_at(i) for i in range(chunks * size)]
    emitted: dict[int, list[int]] = {key: [] for key in counts}
    for chunk in range(chunks):
        own = rows[chunk * size : (chunk + 1) * size]
        (key,) = {keys[row] for row in own}
        emitted[key].append(chunk)
    for key, count in counts.items():  # after e epochs, floor(e n / size) chunks of the bucket
        assert len(emitted[key]) == epochs * count // size
    for epoch in range(epochs + 1):
        before = sum(epoch * n // size for n in counts.values())
        assert all(sum(c < before for c in emitted[key]) == epoch * n // size for key, n in counts.items())


@given(buckets=st.lists(st.integers(0, 3), min_size=1, max_size=40), size=st.integers(1, 5), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_bucket_shows_all_its_rows_before_one_comes_again(buckets, size, seed):
    """Over size epochs a bucket of n rows shows n chunks of size rows: each row size times, and evenly on the way."""
    used = sorted(set(buckets))
    keys = [used.index(bucket) for bucket in buckets]
    order = BucketOrder(keys, size, seed)
    rows = [order.index_at(i) for i in range(len(keys) * size)]
    assert Counter(rows) == dict.fromkeys(range(len(keys)), size)
    assert [order.index_at(i) for i in reversed(range(len(rows)))] == rows[::-1]  # whatever was asked before
    for key in set(keys):
        of_bucket, count = [row for row in rows if keys[row] == key], keys.count(key)
        if count >= size:  # chunks may change places in an epoch, so a row is at most an epoch early or late
            for shown in range(1, len(of_bucket) // count):
                assert max(Counter(of_bucket[: shown * count]).values()) <= shown + 2


def test_chunks_are_in_another_order_every_epoch_and_start_anywhere():
    keys = [i % 3 for i in range(300)]
    order = BucketOrder(keys, 10, 1)
    sequence = [[keys[order.index_at(epoch * 300 + chunk * 10)] for chunk in range(30)] for epoch in range(3)]
    assert len({tuple(chunks) for chunks in sequence}) == 3
    assert all(Counter(chunks) == {0: 10, 1: 10, 2: 10} for chunks in sequence)
    far = 10**12
    assert [order.index_at(far + i) for i in range(20)] == [
        BucketOrder(keys, 10, 1).index_at(far + i) for i in range(20)
    ]
    assert {keys[order.index_at(far + i)] for i in range(10)} == {keys[order.index_at(far)]}


def test_one_key_is_the_plain_order():
    order, plain = order_of(["a"] * 7, 4, 3), Order(7, 3)
    assert [order.index_at(i) for i in range(20)] == [plain.index_at(i) for i in range(20)]


# -- batches ---------------------------------------------------------------------------------------------------------

SHAPES = [(48, 24), (24, 48), (32, 32)]


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 edits: targets of three shapes, one or two sources of two shapes, in an order of no pattern."""
    folder = tmp_path_factory.mktemp("edits")
    rng, rows = np.random.default_rng(0), []
    for i in range(22):
        for name, (height, width) in (("t", SHAPES[rng.integers(3)]), ("s", SHAPES[rng.integers(2)])):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}{i}.png")
        sources = [f"s{i}.png", f"s{(i + 1) % 22}.png"][: 1 + i % 2]
        rows.append({"file_path": f"t{i}.png", "source_file_path": sources, "text": f"edit {i}"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder / "metadata.json"


def images_of(table: Path, *, buckets: bool = True, varies: bool = False) -> Images:
    rules = RowRules(sources=(0, 3), source_sides_px=(64, 32), headers=buckets)
    data = Images(load_rows(table, rules), (32, 32), buckets=buckets, varies=varies, seed=3)
    data.settle(*MODEL)
    return data


def ticks(feed: Feed, count: int, samples_seen: int = 0) -> list[list[Batch]]:
    stream = feed.ticks(samples_seen)
    return [next(stream) for _ in range(count)]


def key(batch: Batch) -> set[tuple]:
    assert batch.images is not None
    sources = [tuple((s.pixels.shape, s.seen.shape) for s in sources) for sources in batch.sources]
    return {(batch.images.shape[2:], each) for each in sources}


def same(first: Batch, second: Batch) -> bool:
    assert first.images is not None
    assert second.images is not None
    pixels = [
        (a.pixels, b.pixels)
        for x, y in zip(first.sources, second.sources, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    return (
        first.indices == second.indices and first.rows == second.rows and torch.equal(first.images, second.images)
        and all(torch.equal(a, b) for a, b in pixels)
    )  # fmt: skip


@pytest.mark.parametrize("buckets", [True, False])
def test_all_processes_of_a_step_have_one_key_and_together_show_the_data(edits, buckets):
    data = images_of(edits, buckets=buckets)
    ranks = [ticks(Feed(data, 3, 1, 2, rank, 2), 40) for rank in (0, 1)]
    assert len({tuple(row.sources_px) for row in data.rows}) > 4
    shown: Counter[int] = Counter()
    for tick in zip(*ranks, strict=True):
        batches = [batch for rank in tick for batch in rank]
        assert len(set.union(*map(key, batches))) == 1
        shown.update(row for batch in batches for row in batch.rows)
    assert len(data.order(3, 4).rows) == len({(s, r.sources_px) for s, r in zip(data.sizes_px, data.rows, strict=True)})
    whole = ticks(Feed(data, 3, 4), 88)  # four epochs: each row four times
    assert Counter(row for (batch,) in whole for row in batch.rows) == dict.fromkeys(range(22), 4 * 4)
    assert set(shown) <= set(range(22))


@pytest.mark.parametrize("split", [(1, 4, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)])
def test_another_number_of_processes_shows_the_same(edits, split):
    batch, accumulate, world = split
    data = images_of(edits)
    alone = ticks(Feed(data, 3, 4), 12)
    parts = [ticks(Feed(data, 3, batch, accumulate, rank, world), 12) for rank in range(world)]
    for number, (whole,) in enumerate(alone):
        rows = [row for micro in range(accumulate) for rank in range(world) for row in parts[rank][number][micro].rows]
        assert rows == list(whole.rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_from_every_tick(edits, workers):
    feed = Feed(images_of(edits), 3, 2, 2, num_workers=workers)
    straight = ticks(feed, 9)
    for start in range(9) if workers == 0 else (1, 5):
        resumed = ticks(replace(feed, dataset=images_of(edits)), 9 - start, start * feed.global_batch)
        assert all(
            same(a, b) for x, y in zip(straight[start:], resumed, strict=True) for a, b in zip(x, y, strict=True)
        )
    if workers:
        alone = ticks(replace(feed, num_workers=0), 9)
        assert all(same(a, b) for x, y in zip(straight, alone, strict=True) for a, b in zip(x, y, strict=True))


def test_targets_keep_their_proportions_in_buckets_and_fill_the_square_without(edits):
    data, square = images_of(edits), images_of(edits, buckets=False)
    options = bucket_sizes(32, 8)
    for row in range(len(data)):
        assert data[row]["images"].shape[1:] == nearest(data.rows[row].image_px, options)
        assert square[row]["images"].shape == (3, 32, 32)
    assert {data[row]["images"].shape[1:] for row in range(22)} == {(48, 24), (24, 48), (32, 32)}


def test_some_batches_have_smaller_sides(tmp_path):
    """At 768 pixels, one batch of ten; all rows of a batch alike, sources as they were."""
    for i, shape in enumerate([(60, 40), (40, 60)] * 4):
        Image.new("RGB", shape[::-1]).save(tmp_path / f"{i}.png")
    rows = [{"file_path": f"{i}.png", "source_file_path": f"{i}.png", "text": "x"} for i in range(8)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    data = Images(
        load_rows(tmp_path / "t.json", RowRules(sources=(1, 1), source_sides_px=(64, None), headers=True)),
        (768, 768), buckets=True, varies=True, seed=5,
    )  # fmt: skip
    data.settle(*MODEL)
    chunks = range(40)
    assert len({side_divisor(768.0, 5, chunk) for chunk in chunks}) == 3
    for tick in zip(chunks, ticks(Feed(data, 5, 1, 2), 40)):
        chunk, batches = tick
        divisor = side_divisor(768.0, 5, chunk)
        (shape,) = {tuple(batch.images.shape[2:]) for batch in batches}
        assert abs(shape[0] * shape[1] / (768 / divisor) ** 2 - 1) < 0.05
        assert {shape[0] > shape[1]} == {
            data.rows[row].image_px[0] > data.rows[row].image_px[1] for b in batches for row in b.rows
        }
        assert all(batch.sources[0][0].pixels.shape[1] in (64, 96) for batch in batches)


# -- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "turned", "alpha", "grey"])
@pytest.mark.parametrize("seen_side", [32, None])
def test_sources_are_resized_as_the_pipelines_do(tmp_path, kind, seen_side):
    pixels = np.random.default_rng(1).integers(0, 256, (45, 80, 4 if kind == "alpha" else 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L") if kind == "grey" else Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    image.save(tmp_path / "s.png", exif=exif)
    (tmp_path / "t.jsonl").write_text(json.dumps({"source_file_path": "s.png", "text": "x"}))
    rules = RowRules(targets=False, sources=(1, 1), source_sides_px=(64, seen_side))
    rows = load_rows(tmp_path / "t.jsonl", rules)
    ((batch,),) = ticks(Feed(Images(rows, (32, 32)), 0, 1), 1)
    ((source,),) = batch.sources
    assert batch.images is None
    with Image.open(tmp_path / "s.png") as opened:
        upright = ImageOps.exif_transpose(opened)
    if kind == "alpha":
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    processor = VaeImageProcessor(vae_scale_factor=16)
    for found, (height, width) in (
        (source.pixels, rows[0].sources_px[0].pixels),
        (source.seen, rows[0].sources_px[0].seen),
    ):
        assert (height >= width) == (kind == "turned") or height == width == 32
        expected = processor.resize(upright.convert("RGB"), height, width)
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
        unit = processor.preprocess(upright.convert("RGB"), height, width)
        torch.testing.assert_close(found[None] / 127.5 - 1, unit, rtol=0, atol=1e-6)


def test_an_image_that_breaks_while_it_is_used_is_one_error(edits, tmp_path):
    data = images_of(edits)
    broken = replace(data.rows[5], sources=(tmp_path / "s.png",), sources_px=data.rows[5].sources_px[:1])
    (tmp_path / "s.png").write_bytes(b"no image")
    data.rows = [*data.rows[:5], broken, *data.rows[6:]]
    with pytest.raises(UserError, match=r"metadata.json, row 6: image s.png cannot be used"):
        ticks(Feed(data, 3, 2), 30)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sides", "counts"),
    [
        ("--method sft --train_mode qwen_image_edit_plus", ((96, 192), (32, 64)), {1, 2}),
        ("--method arcflow --use-lora-gen --train_mode=qwen_image_edit_plus", ((96, 192), (32, 64)), {1, 2}),
        ("--model-family qwen_image_edit_plus --source-size 64 --source-seen-size 64", ((32, 96), (32, 96)), {1, 2}),
    ],
)  # fmt: skip
def test_settings_decide_what_is_read(edits, flags, sides, counts):
    small = "" if "--source-size" in flags else "--source-size 128 --source-seen-size 48"
    parsed = parse([*flags.split(), *small.split(), "--train_data_meta", str(edits), "--image_sample_size", "32"])
    kind = "images" if parsed.run.method == "sft" else "prompts"
    data = dataset_for(kind, parsed)
    item = next(
        data[row]
        for row in range(22)
        if data.rows[row].sources_px[0].pixels[1] > data.rows[row].sources_px[0].pixels[0]
    )
    assert (("images" in item), data.reads_images) == (kind == "images", True)
    assert tuple(tuple(part.shape[1:]) for part in item["sources"][0]) == sides
    assert {len(data.sources(row)) for row in range(22)} == counts


def test_one_source_is_the_limit_of_the_first_edit_model(edits, tmp_path):
    parsed = parse(f"--method sft --model-family qwen_image_edit --data-path-train {edits} --resolution 32".split())
    rejects = Rejects(tmp_path / "rejected.jsonl", 0.0)
    with pytest.raises(
        UserError, match="row 2: 2 sources in source_file_path, the model takes 1; the first of 11 bad rows of 22"
    ):
        dataset_for("images", parsed, rejects)
    assert len(rejects.file.read_text().splitlines()) == 11
    left = dataset_for("images", parsed, Rejects(tmp_path / "rejected.jsonl", 0.5))
    assert (len(left), left.told) == (
        11,
        f"{edits}: left out 11 bad rows of 22, listed in {tmp_path / 'rejected.jsonl'}",
    )
    pixels, seen = left.sources(0)[0]
    assert pixels is seen  # the text encoder sees what the VAE does


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_of_edits_have_their_sources(edits, tmp_path):
    """A table of the teacher's images and a folder of its latents: batches share the sizes of their sources."""
    rows = [{**row, "prompt": row["text"], "seed": i} for i, row in enumerate(json.loads(edits.read_text()))]
    (edits.parent / "pairs.json").write_text(json.dumps(rows))
    lines = [
        "prompt,seed,source_file_path",
        *(f"{row['text']},{row['seed']},{';'.join(row['source_file_path'])}" for row in rows),
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "pairs.json").write_text('{"shard_size": 22}')
    save_file(
        {"latents": torch.arange(22.0)[:, None, None, None].expand(22, 4, 4, 4).contiguous()},
        tmp_path / "latents-00000.safetensors",
    )
    for path, more in (
        (edits.parent / "pairs.json", "--max-pixels 1152"),
        (tmp_path, f"--train-data-dir {edits.parent}"),
    ):
        flags = f"--method direct --model-family qwen_image_edit_plus --source-size 64 --source-seen-size 32 --resolution 32 {more}"
        data = dataset_for("pairs", parse([*flags.split(), "--data-path-train", str(path)]))
        data.settle(*MODEL)
        assert data.reads_images
        expected = images_of(edits, buckets=False)
        whole = [batch for (batch,) in ticks(Feed(data, 3, 4), 22)]
        assert Counter(row for batch in whole for row in batch.rows) == dict.fromkeys(range(22), 4)
        for batch in whole:
            assert len({tuple(source.pixels.shape for source in sources) for sources in batch.sources}) == 1
            assert batch.seeds == batch.rows
            for row, sources in zip(batch.rows, batch.sources, strict=True):
                assert all(
                    torch.equal(s.pixels, other[0]) for s, other in zip(sources, expected.sources(row), strict=True)
                )
            if batch.latents is not None:
                assert batch.latents[:, 0, 0, 0].tolist() == list(batch.rows)
    sdxl = parse(
        ["--method", "direct", "--model-family", "sdxl", "--data-path-train", str(edits.parent / "pairs.json")]
    )
    with pytest.raises(UserError, match="row 1: 1 sources in source_file_path, the model takes none"):
        dataset_for("pairs", sdxl)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shapes_table(tmp_path: Path) -> Path:
    for i in range(8):
        size = [(48, 24), (24, 48)][i % 2]
        Image.new("RGB", size, (30 * i, 200, 90)).save(tmp_path / f"{i}.png")
    lines = ["file_path,text,type", *(f"{i}.png,picture {i},image" for i in range(8)), "gone.png,nothing,image"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "metadata.csv"


def pairs_of_two_sizes(table: Path) -> Path:
    rows = [{"image": f"{i}.png", "prompt": "x", "seed": i} for i in range(8)]
    (table.parent / "pairs.json").write_text(json.dumps(rows))
    return table.parent / "pairs.json"


def test_a_run_in_buckets_goes_on_bit_for_bit_and_leaves_out_bad_rows(trainer: Trainer, shapes_table):
    flags = f"--train-data-meta {shapes_table} --enable-bucket --max-train-steps 4 --checkpoint-steps 2"
    ended = trainer.ends("stopped", flags, "sft")
    assert ended.code == EXIT_USER
    assert "metadata.csv:10: no image gone.png; the first of 1 bad rows of 9, listed in" in ended.err
    assert json.loads((trainer.root / "stopped" / "rejected.jsonl").read_text())["row"] == 10
    flags += " --max-bad-fraction 0.2"
    whole = trainer.run("whole", flags, "sft")
    assert "left out 1 bad rows of 9" in (whole / "log.txt").read_text()
    again = trainer.run(stopped_at(whole, 2, "cut").name, f"{flags} --auto-resume --num-workers 2", "sft")
    tiny.assert_same_checkpoint(whole, again, 4)
    tiny.assert_same_logs(whole, again)
    square = trainer.run("square", f"{flags} --enable-bucket off", "sft")
    assert [line["loss"] for line in tiny.log_lines(square)] != [line["loss"] for line in tiny.log_lines(whole)]
    wanted = trainer.ends("wrong", f"--data-path-train {pairs_of_two_sizes(shapes_table)}", "direct")
    assert "0.png has 48x24 pixels, this run 32x32" in wanted.err
    split = trainer.run("split", f"{flags} --batch-size 1 --gradient-accumulation-steps 2", "sft")
    for first, second in zip(tiny.log_lines(whole), tiny.log_lines(split), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_a_stage_with_another_batch_starts_at_a_whole_one(trainer: Trainer, shapes_table):
    flags = f"--data-path-train {shapes_table} --enable-bucket --max-bad-fraction 0.2"
    first = trainer.run("first", f"{flags} --max-train-steps 1 --batch-size 2", "sft")
    start = first / "checkpoints" / "torch_units" / "step-1.pt"
    (shapes_table.parent / "0.png").unlink()  # a stage may have other data
    second = trainer.run(
        "second", f"{flags} --max-train-steps 4 --batch-size 3 --resume-ckpt {start} --max-bad-fraction 0.5", "sft"
    )
    assert [line["samples_seen"] for line in tiny.log_lines(second)] == [6, 9, 12]


def test_what_auto_stands_for_decides_whether_a_flag_acts(trainer: Trainer):
    ended = trainer.ends("run", "--num-workers 2")
    assert ended.code == EXIT_USER
    assert "--num-workers does nothing where the data is prompts alone" in ended.err
