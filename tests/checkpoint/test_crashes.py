"""A crash or a full disk at every point of a save: complete or absent, and the one before intact."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from saved import CRASHED, assert_holds, files_of, save

from train_t2i import storage
from train_t2i.checkpoint import Part, RunFolder
from train_t2i.errors import EXIT_DISK, UserError

# -- crashes ---------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process and return its exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def crash_at(point: int, work: Callable[[], object]) -> int:
    """The exit code of ``work`` when the process dies at file operation ``point``, a write being half done."""
    count = 0

    def before(operation: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == point:
            if operation == "write":
                path.write_bytes(b"half of it")
            os._exit(CRASHED)

    def child() -> None:
        storage.before = before
        work()

    return in_child(child)


def crash_everywhere(
    tmp_path: Path, prepare: Callable[[RunFolder], None], work: Callable[[RunFolder], object]
) -> Iterator[tuple[RunFolder, bool]]:
    """Yield (run, whether it crashed) for a crash at each operation of ``work``, and once for none."""
    point, code = 0, CRASHED
    while code == CRASHED:
        point += 1
        run = RunFolder(tmp_path / f"run_{point}")
        prepare(run)
        code = crash_at(point, lambda: work(run))  # noqa: B023
        yield run, code == CRASHED
    assert code == 0
    assert point > 5


def assert_tidy(run: RunFolder) -> None:
    removed = run.clean()
    assert run.clean() == []
    steps = {f"step-{step}" for step in run.steps()}
    assert {path.stem for path in run.folder.glob("*/*")} == steps
    assert all(not (run.root / path).exists() for path in removed)


@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
def test_a_crash_anywhere_in_a_save(tmp_path: Path, before: int) -> None:
    def prepare(run: RunFolder) -> None:
        for step in range(1, before + 1):
            save(run, step)

    seen = set()
    for run, crashed in crash_everywhere(tmp_path, prepare, lambda run: save(run, before + 1)):
        latest = run.latest()
        step = int(latest.stem.removeprefix("step-")) if latest else 0
        seen.add(step)
        assert step in ((before, before + 1) if crashed else (before + 1,))
        if latest:
            assert_holds(run, latest, step)
        assert_tidy(run)
        assert_holds(run, save(run, before + 1), before + 1)  # and the run goes on
        assert run.steps() == list(range(before + 1, 0, -1))
    assert seen == {before, before + 1}


@pytest.mark.parametrize("kind", ["uncommitted", "damaged"])
def test_a_crash_anywhere_in_the_replacement_of_a_step(tmp_path: Path, kind: str) -> None:
    def prepare(run: RunFolder) -> None:
        save(run, 1)
        save(run, 2)
        if kind == "uncommitted":
            run.record(2).unlink()
            (run.folder / "accelerator_1/step-2/stray.json").write_text("{}")
            (run.folder / "accelerator_1/.tmp-step-2").mkdir()
            (run.folder / "accelerator_1/.tmp-step-2/stray.json").write_text("{}")
        else:
            (run.folder / "accelerator_2/step-2/optimizer.json").write_text("{}")

    for run, crashed in crash_everywhere(tmp_path, prepare, lambda run: save(run, 2)):
        latest = run.latest()
        assert latest
        step = 1 if latest == run.record(1) else 2
        assert_holds(run, latest, step)
        assert crashed or step == 2
        assert_holds(run, save(run, 2), 2)
        assert not (run.folder / "accelerator_1/step-2/stray.json").exists()


def test_a_crash_anywhere_in_prune_and_clean(tmp_path: Path) -> None:
    def prepare(run: RunFolder) -> None:
        for step in range(1, 4):
            save(run, step)

    for run, crashed in crash_everywhere(tmp_path, prepare, lambda run: run.prune(1)):
        assert run.latest() == run.record(3)
        assert all(run.damage(run.record(step)) is None for step in run.steps())  # none without its folders
        assert crashed or run.steps() == [3]
        crash_at(2, run.clean)
        assert run.latest() == run.record(3)
        assert_tidy(run)


def test_everything_is_flushed_before_it_counts(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, flushed: list[int]
) -> None:
    """Power loss: at the rename of a folder its files and entries are on the disk; at the record's, all of it."""
    log: list[tuple[str, Path]] = []
    monkeypatch.setattr(storage, "before", lambda operation, path: log.append((operation, path)))
    save(run, 1)
    assert len(flushed) == sum(operation == "sync" for operation, _ in log) > 10
    dirty: set[Path] = set()
    for operation, path in log:
        if operation == "sync":
            dirty.discard(path)
        elif operation == "rename":
            source = path.with_name(".tmp-" + path.name)
            assert not {entry for entry in dirty if entry == source or source in entry.parents}
            if path.suffix == ".pt":
                assert not dirty - {path.parent}
            dirty.add(path.parent)
        elif operation in ("write", "mkdir"):
            dirty |= {path, path.parent} if operation == "write" else {path.parent}
    assert not dirty - {run.record(1).parent}
    assert log[-1] == ("sync", run.record(1).parent)


# -- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_anywhere_in_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    point, failed, left = 0, True, set()
    while failed:
        point += 1
        run, count = RunFolder(tmp_path / f"run_{point}"), 0
        save(run, 1)

        def before(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == point:  # noqa: B023
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(storage, "before", before)
        error = None
        try:
            save(run, 2)
        except UserError as raised:
            error = raised
        failed = error is not None
        if error:
            assert error.exit_code == EXIT_DISK
            assert all(word in error.message for word in (os.strerror(code), "step 1 is intact", "needed", "free"))
        monkeypatch.setattr(storage, "before", lambda operation, path: None)
        assert_holds(run, run.record(1), 1)
        assert run.clean() == []  # nothing half-written is left
        left.add((failed, run.latest() == run.record(2)))
    assert left == {(True, False), (True, True), (False, True)}  # the last flush comes after the commit


def test_no_room_is_known_before_anything_is_written(saved: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(saved)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"cannot save step 3 in .*needed 1\.1 MB, free 1\.0 kB") as error:
        save(saved, 3)
    assert error.value.exit_code == EXIT_DISK
    assert files_of(saved) == before


def test_a_real_limit_on_the_size_of_files(saved: RunFolder) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(UserError, match=r"File too large.*checkpoint of step 2 is intact") as error:
            saved.save(3, {"accelerator_1": Part({"model": {"a": torch.zeros(100_000)}})}, {})
        assert error.value.exit_code == EXIT_DISK

    assert in_child(child) == 0
    assert saved.latest() == saved.record(2)
    assert saved.clean() == []
