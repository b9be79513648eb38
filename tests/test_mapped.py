"""Files that replace others: what several processes do to one another, and what the dead leave."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from caches import left_by_a_dead_process

from train_t2i import mapped
from train_t2i.mapped import LEFT_FOR_S, replacing, sweep

pytestmark = pytest.mark.usefixtures("one_thread_before_a_fork")


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def test_two_that_write_one_file_in_a_process(tmp_path: Path) -> None:
    """Each the whole of it; who ends last has the last word."""
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"fir")
        sweep(tmp_path)
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"st")
    assert path.read_bytes() == b"first"
    assert not leftovers(tmp_path)


def test_a_living_process_keeps_its_half_of_a_file(tmp_path: Path) -> None:
    """Another begins, sweeps and writes the same file meanwhile."""
    path, (begun, tell_begun), (go_on, tell_to_go_on) = tmp_path / "file", os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with replacing(path) as file:
                file.write(b"of the ")
                os.write(tell_begun, b"x")
                os.read(go_on, 1)
                file.write(b"child")
            code = 0
        finally:
            os._exit(code)
    os.read(begun, 1)
    sweep(tmp_path)
    with replacing(path) as file:
        file.write(b"of the parent")
    assert path.read_bytes() == b"of the parent"
    assert len(leftovers(tmp_path)) == 1
    os.write(tell_to_go_on, b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_bytes() == b"of the child"
    assert not leftovers(tmp_path)


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    left_by_a_dead_process(tmp_path / "file")
    assert len(leftovers(tmp_path)) == 1
    with replacing(tmp_path / "file") as file:
        sweep(tmp_path)
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_another_host_left_is_removed_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor can the processes of another container be asked, whose numbers are its own; and a number comes again."""
    with monkeypatch.context() as patched:
        patched.setattr(mapped, "here", lambda: "another.host-4026531836")
        left_by_a_dead_process(tmp_path / "file")
    (tmp_path / f".file.{mapped.here()}.{os.getpid()}.0123abcd.tmp").touch()
    (tmp_path / ".other.123.tmp").touch()
    kept = [tmp_path / "file", tmp_path / ".lock", tmp_path / "mine.tmp"]
    for path in kept:
        path.touch()
    sweep(tmp_path)
    assert len(leftovers(tmp_path)) == 3
    for path in [*kept, *leftovers(tmp_path)]:
        os.utime(path, (0, time.time() - LEFT_FOR_S - 60))
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
