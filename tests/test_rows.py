"""Tables of images and edits: every format says the same, and each kind of bad row is named, listed and counted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

from train_t2i.errors import UserError
from train_t2i.pictures import fit_image, image_size
from train_t2i.rows import Rejects, Row, RowRules, load_rows

ONE, SEVERAL, PLAIN = (RowRules(sources=count) for count in ((1, 1), (0, 3), (0, 0)))
GOOD = {"file_path": "train/a.png", "source_file_path": ["source/a.png"], "text": "make it red", "type": "image"}


def save(path: Path, height: int = 8, width: int = 8, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data: train/a.png, source/a.png and b.png, and beside it an image that is not in it."""
    for name in ("data/train/a.png", "data/source/a.png", "data/source/b.png", "secret.png"):
        save(tmp_path / name)
    return tmp_path / "data"


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        cells = [[*rows[0]], *([str(row[key] or "").replace('"', '""') for key in rows[0]] for row in rows)]
        path.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in cells))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def seen(rows: list[Row]) -> list[tuple]:
    return [(row.image, row.prompt, row.sources, row.sources_px) for row in rows]


# -- what is read ----------------------------------------------------------------------------------------------------


def test_all_formats_hold_the_same_rows(data: Path):
    rows = [GOOD, {**GOOD, "source_file_path": ["source/a.png", "source/b.png"]}, {**GOOD, "source_file_path": None}]
    expected = seen(load_rows(write(data / "t.json", rows), SEVERAL))
    assert [len(sources) for _, _, sources, _ in expected] == [1, 2, 0]
    assert expected[0][:3] == (data / "train/a.png", "make it red", (data / "source/a.png",))
    assert expected[0][3] == (((1024, 1024), (1024, 1024)),)
    for suffix in (".jsonl", ".parquet"):
        assert seen(load_rows(write(data / f"t{suffix}", rows), SEVERAL)) == expected
    for cells in (
        ["source/a.png", "source/a.png; source/b.png", ""],
        [json.dumps(r["source_file_path"] or []) for r in rows],
    ):
        csv = write(data / "t.csv", [{**row, "source_file_path": cell} for row, cell in zip(rows, cells, strict=True)])
        assert seen(load_rows(csv, SEVERAL)) == expected


@pytest.mark.parametrize(
    "same",
    [
        {"image": "train/a.png", "source_file_path": "source/a.png", "prompt": "make it red"},
        {"file_path": "train/a.png", "source_file_path": "[\"source/a.png\"]", "text": " make it red\n", "type": None},
        {"file_path": "train/a.png", "source_file_path": ["source/a.png"], "caption": "make it red", "type": "", "width": 3},
    ],
)  # fmt: skip
def test_other_spellings_of_a_row(data: Path, same: dict):
    assert seen(load_rows(write(data / "b.json", [same]), ONE)) == seen(load_rows(write(data / "a.json", [GOOD]), ONE))


def test_sources_are_measured_as_they_are_shown(data: Path):
    save(data / "source/a.png", 900, 1600)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(data / "source/turned.jpg", 900, 1600, exif=exif)
    rules = RowRules(sources=(0, 3), source_sides_px=(1024, 384))
    (row,) = load_rows(
        write(data / "t.json", [{**GOOD, "source_file_path": ["source/a.png", "source/turned.jpg"]}]), rules
    )
    assert row.sources_px == (((768, 1376), (288, 512)), ((1376, 768), (512, 288)))
    assert row.image_px == (8, 8)


def test_targets_are_not_asked_for_where_a_method_needs_none(data: Path):
    rules = RowRules(targets=False, sources=(1, 1))
    (row,) = load_rows(
        write(data / "t.json", [{"text": "x", "source_file_path": "source/a.png", "file_path": "gone.png"}]), rules
    )
    assert (row.image, row.sources) == (None, (data / "source/a.png",))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["exif", "text", "xmp"])
def test_a_png_is_turned_wherever_it_says_so(tmp_path: Path, kind: str, late: bool):
    """The header pass agrees with the decoder, also where EXIF stands behind the pixels."""
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    if kind == "text":
        info.add_text("parameters", "a prompt, as picture generators write it")
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    if kind == "xmp":
        info.add_itxt("XML:com.adobe.xmp", xmp)
    path = save(tmp_path / "a.png", 6, 4, pnginfo=info, exif=exif.tobytes() if kind == "exif" else b"")
    if late:
        path.write_bytes(moved_behind_pixels(path.read_bytes(), b"eXIf" if kind == "exif" else b"Text"))
    shown = fit_image(path, "t", 4, 6).shape[1:]
    with Image.open(path) as image:
        expected = (4, 6) if image.getexif().get(0x0112) == 6 else (6, 4)
    assert image_size(path, "t") == expected
    assert expected == ((6, 4) if kind == "text" else (4, 6))
    assert shown == (4, 6)


def moved_behind_pixels(png: bytes, kind: bytes) -> bytes:
    """The chunks of a kind (Text: iTXt, tEXt) before the last one."""
    chunks, at = [], 8
    while at < len(png):
        size = 12 + int.from_bytes(png[at : at + 4], "big")
        chunks.append(png[at : at + size])
        at += size
    moved = [chunk for chunk in chunks if chunk[4:8] == kind or (kind == b"Text" and chunk[4:8] in (b"iTXt", b"tEXt"))]
    assert moved
    return png[:8] + b"".join([*(c for c in chunks[:-1] if c not in moved), *moved, chunks[-1]])


def test_the_header_of_a_png_is_read_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path / "a.png", 6, 4)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(path, "t") == (6, 4)


# -- bad rows --------------------------------------------------------------------------------------------------------

BAD = {
    "video": ({"type": "video"}, ONE, "type is video; image models train on images"),
    "no text": ({"text": 3}, ONE, "text is 3, not text"),
    "no target": ({"file_path": ""}, ONE, "no image"),
    "a target that is not there": ({"file_path": "train/none.png"}, ONE, "no image train/none.png"),
    "a source that is not there": ({"source_file_path": ["source/none.png"]}, ONE, "no image source/none.png"),
    "no source": ({"source_file_path": []}, ONE, "0 sources in source_file_path, the model takes 1"),
    "a null": ({"source_file_path": None}, ONE, "0 sources in source_file_path, the model takes 1"),
    "two sources": ({"source_file_path": "source/a.png;source/b.png"}, ONE, "2 sources in source_file_path, the model takes 1"),
    "four sources": ({"source_file_path": ["source/a.png"] * 4}, SEVERAL, "4 sources in source_file_path, the model takes 0 to 3"),
    "sources of text to image": ({}, PLAIN, "1 sources in source_file_path, the model takes none"),
    "a number as source": ({"source_file_path": [3]}, ONE, "source_file_path is 3, not text"),
    "a blank source": ({"source_file_path": ["source/a.png", ""]}, SEVERAL, "a blank path in source_file_path"),
    "half a list": ({"source_file_path": '["source/a.png"'}, ONE, "source_file_path is not a JSON list"),
    "out of the root": ({"source_file_path": ["../secret.png"]}, ONE, "image ../secret.png is outside"),
    "out by a link": ({"source_file_path": ["source/link.png"]}, ONE, "image source/link.png is outside"),
    "out by a linked folder": ({"file_path": "up/secret.png"}, ONE, "image up/secret.png is outside"),
    "text as source": ({"source_file_path": ["source/text.png"]}, ONE, "image text.png cannot be used"),
    "text as target": ({"file_path": "source/text.png"}, ONE, "image text.png cannot be used"),
    "nothing left of it": ({"source_file_path": ["source/line.png"]}, ONE, "image line.png: 20000x1 px is too narrow"),
}  # fmt: skip


@pytest.fixture
def traps(data: Path) -> Path:
    (data / "source/text.png").write_text("no image")
    (data / "source/link.png").symlink_to(data.parent / "secret.png")
    (data / "up").symlink_to(data.parent)
    save(data / "source/line.png", 1, 20_000)
    return data


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_listed_at_once(traps: Path, case: str):
    bad, rules, reason = BAD[case]
    good = {**GOOD, "source_file_path": []} if rules is PLAIN else GOOD
    table = write(traps / "t.json", [good, {**good, **({**GOOD, **bad} if rules is PLAIN else bad)}, good])
    rejects, began = Rejects(traps / "run/rejected.jsonl", 0.0), time.monotonic()
    with pytest.raises(UserError) as told:
        rejects.settle(table, len(load_rows(table, rules, rejects)) + len(rejects.bad))
    assert time.monotonic() - began < 1
    assert told.value.message.startswith(f"{table}, row 2: {reason}")
    assert told.value.message.endswith(f"; the first of 1 bad rows of 3, listed in {rejects.file}")
    assert "--max-bad-fraction" in told.value.hint
    (listed,) = map(json.loads, rejects.file.read_text().splitlines())
    assert (listed["row"], listed["place"]) == (2, f"{table}, row 2")
    assert reason in listed["reason"]
    with pytest.raises(UserError, match="row 2"):  # where nothing collects them, as in evaluate
        load_rows(table, rules)


def test_bad_rows_are_left_out_up_to_a_share(traps: Path):
    table = write(traps / "t.json", [{**GOOD, **BAD["text as source"][0]}, GOOD, GOOD, {**GOOD, "type": "video"}])
    for most, stops in ((0.4, True), (0.5, False)):
        rejects = Rejects(traps / "rejected.jsonl", most)
        rows = load_rows(table, ONE, rejects)
        assert [row.number for row in rows] == [2, 3]
        if stops:
            with pytest.raises(UserError, match=r"row 1: .*; the first of 2 bad rows of 4, listed in"):
                rejects.settle(table, 4)
        else:
            assert rejects.settle(table, 4) == f"{table}: left out 2 bad rows of 4, listed in {rejects.file}"
        assert [json.loads(line)["row"] for line in rejects.file.read_text().splitlines()] == [1, 4]
    good = Rejects(traps / "rejected.jsonl", 0.5)
    assert good.settle(table, 4) == ""
    assert not good.file.exists()


def test_one_of_several_processes_writes_the_list(traps: Path):
    table = write(traps / "t.json", [{**GOOD, "type": "video"}])
    rejects = Rejects(traps / "rejected.jsonl", 0.0, writes=False)
    assert load_rows(table, ONE, rejects) == []
    with pytest.raises(UserError, match="type is video"):
        rejects.settle(table, 1)
    assert not rejects.file.exists()


# -- roots -----------------------------------------------------------------------------------------------------------


def test_roots(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The table's folder, another one, absolute paths inside it, and paths as written."""
    expected = (data / "train/a.png", (data / "source/a.png",))
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    absolute = {**GOOD, "file_path": str(data / "train/a.png"), "source_file_path": [str(data / "source/a.png")]}

    def found(folder: Path, row: dict, root: str | None) -> tuple:
        (row_read,) = load_rows(write(folder / "t.json", [row]), RowRules(root=root, sources=(1, 1)))
        return row_read.image, row_read.sources

    assert found(data, GOOD, None) == found(data, absolute, None) == expected
    assert found(elsewhere, GOOD, str(data)) == found(elsewhere, absolute, str(data)) == expected
    assert found(elsewhere, absolute, "") == expected
    monkeypatch.chdir(data)
    assert found(elsewhere, GOOD, "") == (Path("train/a.png"), (Path("source/a.png"),))
    assert found(elsewhere, GOOD, ".") == expected
    for row, root in ((absolute, None), (GOOD, None), ({**GOOD, "file_path": "../secret.png"}, str(data))):
        with pytest.raises(UserError, match=r"is outside|no image"):
            found(elsewhere, row, root)
    with pytest.raises(UserError, match=r"no image none.png \(paths are taken as written\)"):
        found(elsewhere, {**GOOD, "file_path": "none.png"}, "")
