"""Prompts from one file, many, or the hub: one sequence that stays on the disk."""

from __future__ import annotations

import builtins
import contextlib
import errno
import gc
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from train_t2i import distinct, hub, prompts, tables
from train_t2i.errors import EXIT_DISK, EXIT_USER, UserError
from train_t2i.prompts import load_prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, and what is none."""
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.csv").write_text("prompt\nthree\n")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n"five"\n')
    (tmp_path / "README.md").write_text("not a prompt\n")
    return tmp_path


def refused(source: str | Path, *words: str) -> UserError:
    with pytest.raises(UserError) as told:
        load_prompts(source)
    assert told.value.exit_code == EXIT_USER
    assert all(word in told.value.message for word in words), told.value.message
    return told.value


# -- one file, many --------------------------------------------------------------------------------------------------


def test_several_files_are_one_sequence(folder: Path) -> None:
    everything = ["three", "one", "two", "four", "five"]
    assert list(load_prompts(folder)) == everything
    assert list(load_prompts(f"{folder}/*.[tcj]*")) == everything
    assert list(load_prompts(f"{folder}/c.jsonl, {folder}/b.txt,")) == ["four", "five", "one", "two"]
    assert list(load_prompts(f"{folder}/c.jsonl,{folder}/[ab].*")) == ["four", "five", "three", "one", "two"]
    store = load_prompts(folder)
    assert [store[i] for i in (4, 0, -1, 2, -5)] == ["five", "three", "five", "two", "three"]
    assert store[1:4] == ["one", "two", "four"]
    assert store[:100] == everything
    with pytest.raises(IndexError):
        store[5]


def test_a_name_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a,b[1].txt").write_text("mine\n")
    assert list(load_prompts(tmp_path / "a,b[1].txt")) == ["mine"]


def test_a_list_that_is_longer_than_a_name_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """14 files in this folder, 320 letters without a slash; a glob and the name of a hub as well."""
    monkeypatch.chdir(tmp_path)
    names = [f"prompts-part-{i:05d}.txt" for i in range(14)]
    for i, name in enumerate(names):
        Path(name).write_text(f"prompt {i}\n")
    assert list(load_prompts(",".join(names))) == [f"prompt {i}" for i in range(14)]
    with pytest.raises(OSError, match="File name too long"):
        Path(",".join(names)).exists()
    long = "a" * 300
    refused(long, f"cannot read {long}: File name too long")
    refused(f"{names[0]},{long}.csv", f"cannot read {long}.csv: File name too long")
    refused(f"{long}*", "no file of such a name")
    assert prompts.places(f"{long}/b") == [hub.Dataset(f"{long}/b")]


def test_sources_that_name_nothing(folder: Path) -> None:
    refused(f"{folder}/*.tsv", "no file of such a name")
    refused(f"{folder}/b.txt,{folder}/none.txt", "none.txt", "No such file")
    (folder / "empty").mkdir()
    refused(folder / "empty", "is a folder without prompts")
    (folder / "d.txt").write_text("\n \n")
    refused(folder, "d.txt holds no prompt")


def test_a_fault_is_told_with_its_file_and_line(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"fine\nnot \xff fine\n")
    refused(folder, "b.txt:2:5: not valid UTF-8")


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_lines_lie_where_they_are_said_to_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """Blank of every kind at the ends of lines, both ways to end one, in every cut of the file into blocks."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", block_bytes)
    blanks = [chr(i) for i in range(0x3001) if chr(i).isspace() and chr(i) not in "\n\r" and i > 0x9F] + [" ", "\t", ""]
    chance = np.random.default_rng(0)
    words = ["a", "猫", "é", "\u200b", "x\u2028y", "\U0001f431"]
    lines = ["".join(chance.choice(part, 3)) for _ in range(150) for part in (blanks, words, blanks)]
    lines = ["".join(lines[i : i + 3]) for i in range(0, 450, 3)]
    text = "\ufeff" + "".join(line + chance.choice(["\n", "\r\n"]) for line in lines)
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert list(load_prompts(tmp_path / "p.txt")) == [line.strip() for line in lines if line.strip()]


# -- memory and the disk ---------------------------------------------------------------------------------------------


def test_a_file_that_changes_in_use_is_told(tmp_path: Path) -> None:
    """Its bytes are read where they lie: what was noted of them would point anywhere."""
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\n")
    store = load_prompts(path)
    path.write_text("o\n")
    with pytest.raises(UserError, match=r"p\.txt was changed while it was in use"):
        store[0]
    kept = load_prompts(path)
    (tmp_path / "new").write_text("other\n")
    (tmp_path / "new").rename(path)  # another file under the same name harms nobody
    assert kept[0] == "o"


def test_a_table_may_change_once_it_was_copied(folder: Path) -> None:
    store = load_prompts(folder / "a.csv")
    (folder / "a.csv").write_text("")
    assert list(store) == ["three"]


def test_no_descriptor_and_no_file_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    gc.collect()  # what earlier tests left open
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    store = load_prompts(folder)
    assert store[0]
    assert not list((folder / "tmp").iterdir())  # nothing that a kill could leave
    del store
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before


@pytest.mark.parametrize("name", ["b.txt", "a.csv"])
def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    with pytest.raises(UserError, match=rf"{name}: its index cannot be written.*No space left.*TMPDIR") as told:
        load_prompts(folder / name)
    assert told.value.exit_code == EXIT_DISK


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_disk_that_is_full_of_the_prompts_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """What a table holds is copied: told when it is written, or when the last of it leaves its buffer."""
    (tmp_path / "a.csv").write_text("prompt\n" + "three words and more\n" * rows)
    made = tempfile.TemporaryFile
    files = iter([made(), made(), open("/dev/full", "w+b")])  # noqa: SIM115 - two of notes, one of prompts
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: next(files))
    with pytest.raises(UserError, match=r"a\.csv: its index cannot be written.*No space left"):
        load_prompts(tmp_path / "a.csv")


def test_a_disk_that_cannot_be_read_is_not_a_full_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(prompts, "sound_blocks", broken)
    refused(folder / "b.txt", "b.txt: cannot be read (Input/output error)")
    monkeypatch.setattr(Path, "iterdir", broken)
    refused(folder, f"{folder}: cannot be read (Input/output error)")


@contextlib.contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """No more may be opened than so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) + 80, hard)
        )
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(stack.enter_context(open("/dev/null")))
        for file in taken[:descriptors]:
            file.close()
        yield


@pytest.mark.parametrize("descriptors", [50, 1])
def test_more_files_than_may_be_open(tmp_path: Path, descriptors: int) -> None:
    """Each holds two; where even the temporary files cannot be made, it is not for want of room on a disk."""
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"prompt {i}\n")
    assert len(load_prompts(tmp_path)) == 40
    with room_for(descriptors):
        told = refused(tmp_path, ".txt: cannot be read (Too many open files)")
    assert "ulimit -n" in told.hint


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_different_ones_are_counted_a_share_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(distinct, "HASHES_AT_ONCE", at_once)
    hashes = np.random.default_rng(1).integers(0, 2**64, 40, dtype=np.uint64)
    hashes = np.concatenate([hashes, hashes[:15], hashes[:5]])
    with tempfile.TemporaryFile() as file:
        file.write(hashes.tobytes())
        file.flush()
        assert distinct.distinct(file, len(hashes)) == 40


# -- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hub:org/name", hub.Dataset("org/name")),
        ("org/name", hub.Dataset("org/name")),
        ("hub:org/name-1.5:test", hub.Dataset("org/name-1.5", "test")),
        ("org/name:train:caption", hub.Dataset("org/name", "train", "caption")),
    ],
)
def test_names_of_the_hub(text: str, parsed: hub.Dataset) -> None:
    assert prompts.places(text) == [parsed]


def test_what_is_no_name_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for local in (f"{folder.name}/none", "none/of.txt", "a/b/c", "none"):
        assert prompts.places(local) == [Path(local)]
        refused(local, "cannot read", "No such file")
    for wrong in ("hub:", "hub:a::b", "hub:a:b:c:d"):
        refused(wrong, "not the name of a hub dataset")


def test_without_the_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "uv sync --extra datasets" in refused("hub:org/name", "hub:org/name:train", "not installed").hint


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of a hub's repository, read by the real package."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "org").mkdir()
    rows = [{"id": i, "caption": text} for i, text in enumerate(["a  cat ", None, "a\ndog", "猫"])]
    for split in ("train", "test"):
        lines = rows if split == "train" else rows[:1]
        (tmp_path / "org" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path / "org"


def test_a_dataset_is_read_as_any_table(dataset: Path) -> None:
    assert list(load_prompts(f"hub:{dataset}")) == ["a  cat", "a dog", "猫"]
    assert list(load_prompts(f"hub:{dataset}:test:caption")) == ["a  cat"]


def test_a_dataset_that_cannot_be_used_is_one_line(dataset: Path) -> None:
    refused(f"hub:{dataset}:train:text", "no column text; it has: ", "caption")
    refused(f"hub:{dataset}:train:id", ":1: id is 0, not text")
    refused(f"hub:{dataset}:none", "cannot be loaded")
    refused("hub:nobody/nothing-of-this-name", "cannot be loaded")  # no network in a test
