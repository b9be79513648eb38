"""Readers take a file whole or say where it is wrong; the order starts anywhere and ignores how the work is split."""

import json
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train_t2i import pictures, prompts, tables
from train_t2i.data import Order, batch_indices
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.rows import Row, load_rows


def load_prompts(source: str | Path) -> list[str]:
    return list(prompts.load_prompts(source))


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, reason: str, load=load_prompts) -> None:
    """It is refused in one line that holds ``reason`` and the file's name."""
    with pytest.raises(UserError) as error:
        load(path)
    assert error.value.exit_code == EXIT_USER
    assert "\n" not in str(error.value)
    assert reason in error.value.message
    assert path.name in error.value.message


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_each_epoch_visits_every_row_once_in_another_order(count: int) -> None:
    order = Order(count, seed=3)
    epochs = [[order.index_at(epoch * count + i) for i in range(count)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count == 100:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        other = [Order(count, seed=4).index_at(i) for i in range(count)]
        assert other != epochs[0]


def test_the_order_starts_anywhere() -> None:
    order = Order(10, seed=1)
    straight = [order.index_at(i) for i in range(60)]
    for start in (0, 7, 10, 25, 59):
        fresh = Order(10, seed=1)
        assert [fresh.index_at(i) for i in range(start, 60)] == straight[start:]
    shuffled = torch.randperm(60).tolist()
    assert [order.index_at(i) for i in shuffled] == [straight[i] for i in shuffled]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 15, 16, 17, 31, 97, 100, 255, 256, 257, 999, 1000, 4096])
def test_an_epoch_is_a_permutation_for_any_count(count: int) -> None:
    assert sorted(Order(count, seed=count).index_at(3 * count + i) for i in range(count)) == list(range(count))


def test_the_order_of_very_many_rows_costs_no_more() -> None:
    """2**40 rows, of which nobody could hold a list."""
    order = Order(2**40, seed=2)
    seen = [order.index_at(2**39 + i) for i in range(2000)]
    assert len(set(seen)) == 2000
    assert 0 <= min(seen) < 2**40 / 100 < 2**40 * 0.99 < max(seen) < 2**40
    assert abs(np.mean(seen) / 2**40 - 0.5) < 4 / np.sqrt(12 * 2000)


def test_all_orders_of_a_few_rows_come_about_equally_often() -> None:
    """Chi-square over the 24 orders of 4 rows, and over where each of 50 rows stands."""
    order, epochs = Order(4, seed=7), 6000
    counts = Counter(tuple(order.index_at(4 * epoch + i) for i in range(4)) for epoch in range(epochs))
    assert len(counts) == 24
    assert sum((c - epochs / 24) ** 2 / (epochs / 24) for c in counts.values()) < 49.7  # 23 degrees, p = 0.001
    order, places = Order(50, seed=7), np.zeros((50, 50))
    for epoch in range(500):
        for i in range(50):
            places[i, order.index_at(50 * epoch + i)] += 1
    assert ((places - 10) ** 2 / 10).sum() < 2617  # 49 * 49 degrees, p = 0.001


def test_neighbours_do_not_stay_together() -> None:
    order = Order(10_000, seed=1)
    seen = np.array([order.index_at(i) for i in range(10_000)])
    assert abs(np.corrcoef(seen[:-1], seen[1:])[0, 1]) < 0.04
    assert (np.abs(np.diff(seen)) == 1).sum() < 12
    other = np.array([order.index_at(10_000 + i) for i in range(10_000)])
    assert abs(np.corrcoef(seen, other)[0, 1]) < 0.04


def test_the_order_ignores_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = [Order(50, seed=1).index_at(i) for i in range(50)]
    assert torch.equal(torch.rand(1), expected)
    assert first == [Order(50, seed=1).index_at(i) for i in range(50)]


@pytest.mark.parametrize(
    ("batch", "world", "accumulate"), [(1, 1, 8), (8, 1, 1), (4, 2, 1), (1, 4, 2), (2, 4, 1), (2, 1, 4)]
)
def test_a_tick_shows_the_same_samples_however_it_is_split(batch: int, world: int, accumulate: int) -> None:
    split = [
        batch_indices(16, batch, rank, world, micro, accumulate) for micro in range(accumulate) for rank in range(world)
    ]
    assert [index for part in split for index in part] == list(range(16, 24))


@pytest.mark.parametrize("wrong", [{"rank": 1}, {"micro": 1}, {"rank": -1}])
def test_a_rank_outside_the_world(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rank"):
        batch_indices(0, 1, **wrong)


# ---------------------------------------------------------------- prompts


@pytest.fixture(params=[1 << 20, 1], ids=["blocks", "lines"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a text file: a megabyte at once, and a line at a time."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", request.param)


def test_text_lines(blocks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "\ufeffa cat\r\n\n  a dog \ta\u2028b\n" + "a cat\n \u3000 \nkatze, groß 猫\r"
    with caplog.at_level(logging.INFO):
        found = load_prompts(write(tmp_path / "p.txt", text))
    assert found == ["a cat", "a dog \ta\u2028b", "a cat", "katze, groß 猫"]
    assert "4 prompts, 1 duplicates kept, 2 blank dropped" in caplog.text
    assert load_prompts(write(tmp_path / "no_suffix", "x" * tables.MAX_PROMPT_BYTES)) == ["x" * tables.MAX_PROMPT_BYTES]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n \r\n\t\n", "holds no prompt, only 3 blank"),
        (b"\xef\xbb\xbf", "holds no prompt"),
        (b"a\nb\xffc\n", ":2:2: not valid UTF-8"),
        ("ok\nß".encode("utf-16"), ":1:1: not valid UTF-8"),
        (b"a\n\nb\0c\n", ":3:2: NUL byte"),
        (b"a\n\x1b[31mred\n", ":2:1: control character U+001B"),
        (b"a\rb\n", ":1:2: control character U+000D"),
        ("a\nb \u0085".encode(), ":2:3: control character U+0085"),
        (b"a\n" * 5 + b"x" * 16_001 + b"\nb", ":6: a line longer than 16000 bytes"),
        (b"a\n" + b"x" * 3_000_000, ":2: a line longer"),
    ],
)
def test_text_that_is_refused(blocks: None, tmp_path: Path, content: bytes, reason: str) -> None:
    refused(write(tmp_path / "p.txt", content), reason)


def test_a_fault_far_down_is_found_at_its_line(tmp_path: Path) -> None:
    lines = [f"a prompt of some words, number {i}\n" for i in range(100_000)]
    lines[77_776] = "broken\0\n"
    refused(write(tmp_path / "p.txt", "".join(lines)), ":77777:7: NUL byte")
    lines[77_776] = "whole\n"
    assert load_prompts(write(tmp_path / "p.txt", "".join(lines))) == [line.strip() for line in lines]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", "No such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "x.csv").mkdir()
    refused(tmp_path / "x.csv", "is a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    with pytest.raises(UserError, match="cannot read"):
        load_prompts("a\0b")


TABLE = [{"id": 1, "prompt": "a cat"}, {"id": 2, "prompt": 'a, "dog" \n\tü'}, {"id": 3, "prompt": ""}]


def write_table(path: Path, rows: list[dict]) -> Path:
    """The same rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        write(path, json.dumps(rows))
    elif path.suffix == ".jsonl":
        write(path, "".join(json.dumps(row) + "\r\n" for row in rows) + "\n")
    else:
        quoted = [[*rows[0]], *([str(row[key]).replace('"', '""') for key in rows[0]] for row in rows)]
        delimiter = "\t" if path.suffix == ".tsv" else ","
        write(path, "".join(delimiter.join(f'"{cell}"' for cell in row) + "\n" for row in quoted))
    return path


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV"])
def test_tables(tmp_path: Path, suffix: str, column: str) -> None:
    rows = [{"id": row["id"], column: row["prompt"]} for row in TABLE]
    assert load_prompts(write_table(tmp_path / f"t{suffix}", rows)) == ["a cat", 'a, "dog"  ü']


def test_other_shapes_of_json(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "a.json", '["a", "b"]')) == ["a", "b"]
    assert load_prompts(write(tmp_path / "b.json", '{"prompt": ["a", "b"], "n": [1, 2]}')) == ["a", "b"]
    assert load_prompts(write(tmp_path / "c.jsonl", '"a"\n{"prompt": "b"}\n{"prompt": null}')) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "name,words\na,b\n", ":2: no column prompt, text, caption; it has: name, words"),
        ("t.csv", "prompt\n", "holds no prompt"),
        ("t.csv", "prompt,n\na cat, red,1\n", ":2: 3 cells under 2 columns"),
        ("t.csv", 'prompt\na\n"b\n', "unexpected end of data"),
        ("t.csv", "prompt,prompt\na,b\n", ":1: two columns of the same name"),
        ("t.csv", b"prompt\na\xff\n", ":2:2: not valid UTF-8"),
        ("t.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', ":2:15: bad JSON"),
        ("t.jsonl", '{"prompt": "a"}\n{"words": "b"}\n', ":2: no column prompt"),
        ("t.jsonl", '{"prompt": ["a"]}', ":1: prompt is ['a'], not text"),
        ("t.jsonl", '{"prompt": "a\\u0000b"}', ":1: control character U+0000"),
        ("t.jsonl", '{"prompt": "a\\ud800b"}', ":1: half a surrogate pair"),
        ("t.jsonl", json.dumps({"prompt": "ü" * 8001}), ":1: prompt is longer than 16000 bytes"),
        ("t.jsonl", "3\n", ":1: neither an object nor text"),
        ("t.jsonl", "9" * 5000, ":1: bad JSON"),
        ("t.json", "[" * 100_000, ":1: bad JSON"),
        ("t.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', ":3:11: bad JSON"),
        ("t.json", b'["a",\n"\xff"]', ":2: not valid UTF-8"),
        ("t.json", '{"prompt": "a"}', "neither a list of rows nor a table"),
        ("t.json", '{"prompt": ["a"], "n": []}', "different lengths"),
        ("t.json", '["a", 3]', "row 2: neither an object nor text"),
        ("t.json", "[]", "holds no prompt"),
        ("t.parquet", b"PAR1 and something else PAR1", "bad parquet"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, content: bytes | str, reason: str) -> None:
    refused(write(tmp_path / name, content), reason)


def test_parquet_that_is_refused(tmp_path: Path) -> None:
    refused(write_table(tmp_path / "a.parquet", [{"x": "a"}]), "no column prompt, text, caption; it has: x")
    refused(write_table(tmp_path / "b.parquet", [{"prompt": "a"}, {"prompt": None}][1:]), "holds no prompt")
    refused(write_table(tmp_path / "c.parquet", [{"prompt": 1}]), "row 1: prompt is 1, not text")
    broken = pyarrow.Table.from_arrays([pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())], ["prompt"])
    pyarrow.parquet.write_table(broken, tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "bad parquet")
    whole = write_table(tmp_path / "e.parquet", TABLE).read_bytes()
    refused(write(tmp_path / "e.parquet", whole[:-20]), "bad parquet")


# ---------------------------------------------------------------- images


def png(path: Path, height: int, width: int, mode: str = "RGB") -> np.ndarray:
    channels = {"RGB": 3, "RGBA": 4}.get(mode, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(path)
    return pixels


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_rows(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "images").mkdir()
    png(tmp_path / "images/a.png", 8, 6)
    full = {"image": "images/a.png", "prompt": "a cat", "seed": "of another program"}
    (row,) = load_rows(write_table(tmp_path / f"full{suffix}", [full]))
    assert (row.image, row.prompt) == (tmp_path / "images/a.png", "a cat")
    (row,) = load_rows(write_table(tmp_path / f"bare{suffix}", [{"text": "", "image": str(tmp_path / "images/a.png")}]))
    assert row.prompt == ""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "none.png"}, ":2: no image none.png"),
        ({"image": ""}, ":2: no image"),
        ({"image": "../secret.png"}, ":2: image ../secret.png is outside"),
        ({"image": "/etc/passwd"}, ":2: image /etc/passwd is outside"),
        ({"image": "link.png"}, ":2: image link.png is outside"),
        ({"image": "up/secret.png"}, ":2: image up/secret.png is outside"),
        ({"image": ".."}, "outside"),
        ({"image": "."}, "outside"),
        ({"image": "x" * 300}, "no image xxx"),
        ({"image": 3}, ":2: image is 3, not text"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, row: dict, reason: str) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    png(folder / "a.png", 2, 2)
    png(tmp_path / "secret.png", 2, 2)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    good = {"image": "a.png", "prompt": "x"}
    refused(write_table(folder / "t.jsonl", [good, {"prompt": "x", **row}]), reason, load_rows)


def test_a_row_knows_its_place(tmp_path: Path) -> None:
    png(tmp_path / "a.png", 2, 2)
    table = write(tmp_path / "t.csv", "image,prompt\na.png,x\na.png,x\n")
    assert load_rows(table)[1].place == f"{table}:3"
    refused(write(tmp_path / "t.txt", "a.png"), "is not a table", load_rows)


def fit_image(image: Path, height_px: int, width_px: int) -> torch.Tensor:
    return pictures.fit_image(image, "t.csv:5", height_px, width_px)


def test_pixels(tmp_path: Path) -> None:
    pixels = png(tmp_path / "a.png", 8, 6)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    image = fit_image(tmp_path / "a.png", 8, 6)
    assert torch.equal(image, expected)
    assert image.dtype == torch.float32


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    pixels = png(tmp_path / "rgba.png", 4, 4, "RGBA").astype(float)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    found = fit_image(tmp_path / "rgba.png", 4, 4).permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() < 1
    grey = png(tmp_path / "grey.png", 4, 4, "L")
    assert torch.equal(fit_image(tmp_path / "grey.png", 4, 4)[1], torch.from_numpy(grey[..., 0]) / 255)
    turned = Image.new("RGB", (6, 4), "red")
    turned.getexif()[0x0112] = 6  # a camera held upright
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert fit_image(tmp_path / "turned.jpg", 6, 4).shape == (3, 6, 4)


def test_fit_takes_the_centre_and_keeps_proportions(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert torch.equal(fit_image(tmp_path / "wide.png", 10, 10), torch.ones(3, 10, 10))
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "high.png")
    assert fit_image(tmp_path / "high.png", 20, 20)[:, 4:16, 4:16].min() == 1
    Image.new("RGB", (1, 20_000)).save(tmp_path / "line.png")
    assert fit_image(tmp_path / "line.png", 32, 64).shape == (3, 32, 64)


def bomb(path: Path, width: int, height: int) -> None:
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_images_that_are_refused(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    png(tmp_path / "cut.png", 64, 64)
    write(tmp_path / "cut.png", (tmp_path / "cut.png").read_bytes()[:2000])
    write(tmp_path / "text.png", "no image")
    write(tmp_path / "empty.png", "")
    write(tmp_path / "code.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    bomb(tmp_path / "bomb.png", 50_000, 50_000)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "whole_bomb.png")
    reasons = {
        "code.eps": "cannot identify",
        "deep.png": "8 bits",
        "bomb.png": "bomb",
        "whole_bomb.png": "64000000 pixels",
    }
    for image in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=rf"t\.csv:5: image {image.name} cannot be used") as error:
            fit_image(image, 4, 4)
        assert "\n" not in str(error.value)
        assert reasons.get(image.name, "") in error.value.message
    assert not recwarn


# ---------------------------------------------------------------- fuzz

SUFFIXES = [".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet"]
SCRAPS = [
    b'"',
    b",",
    b"\n",
    b"\r\n",
    b"\t",
    b"prompt",
    b"image",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b'{"prompt": "a"}',
    b"\xef\xbb\xbf",
]
SCRAPS += [
    b"\0",
    b"\xff",
    b"\xc2\x85",
    b"\\ud800",
    b"null",
    b"1e999",
    b"NaN",
    b"PAR1",
    b"seed",
    "猫".encode(),
    b"a cat",
    b"../x",
]


def read_or_refused(load: Callable, path: Path) -> Sequence:
    """What was read, never nothing; empty after a UserError that names the file; any other exception is a failure."""
    error = None
    try:
        found = load(path)
    except UserError as raised:
        error = raised
    if error is None:
        assert len(found)
        return found
    assert path.name in error.message
    assert error.exit_code == EXIT_USER
    return []


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(SCRAPS), max_size=12).map(b"".join)),
    st.sampled_from(SUFFIXES),
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = write(tmp_path / f"fuzz{suffix}", content)
    for load in (load_prompts, load_rows):
        for prompt in read_or_refused(load, path):
            assert isinstance(prompt, Row) or (prompt.strip() and prompt.encode())


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_good_file_is_read_or_refused(tmp_path: Path, draw) -> None:
    suffix = draw.draw(st.sampled_from([".csv", ".jsonl", ".json", ".parquet", ".png"]))
    path = tmp_path / f"good{suffix}"
    if suffix == ".png":
        png(path, 16, 16)
    else:
        write_table(path, TABLE)
    content = bytearray(path.read_bytes())
    for _ in range(draw.draw(st.integers(1, 3))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    write(
        path, bytes(content[: draw.draw(st.integers(0, len(content)))]) if draw.draw(st.booleans()) else bytes(content)
    )
    read_or_refused(load_prompts if suffix != ".png" else lambda path: fit_image(path, 8, 8), path)
