"""What a save leaves on the disk, what is kept, and one run a folder."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved import assert_holds, files_of, save

from train_t2i import storage
from train_t2i.checkpoint import Part, RunFolder
from train_t2i.errors import EXIT_LOCKED, EXIT_USER, UserError

# -- what is on the disk ---------------------------------------------------------------------------------------------


def test_round_trip_and_layout(saved: RunFolder) -> None:
    assert_holds(saved, saved.record(2), 2)
    names = [str(path.relative_to(saved.folder)) for path in files_of(saved) if "step-2" in str(path)]
    assert names == [
        "accelerator_1/step-2/model.safetensors",
        "accelerator_1/step-2/optimizer.safetensors",
        "accelerator_2/step-2/model.safetensors",
        "accelerator_2/step-2/optimizer.json",
        "torch_units/step-2.pt",
    ]
    plain = torch.load(saved.record(2), weights_only=True)  # anybody's torch reads the record
    assert plain["step"] == 2
    assert sorted(plain["manifest"]) == names[:-1]
    assert load_file(saved.folder / names[0])["b"] == 2


def test_some_parts_alone(saved: RunFolder) -> None:
    shutil.rmtree(saved.folder / "accelerator_2")
    assert list(saved.load(saved.record(2), ["accelerator_1"])[0]) == ["accelerator_1"]
    with pytest.raises(UserError, match="no part lora_gen"):
        saved.load(saved.record(2), ["lora_gen"])


def test_views_and_tied_tensors_are_whole_and_readable_by_the_group(run: RunFolder) -> None:
    flat = torch.arange(12.0)
    tied = torch.ones(3, requires_grad=True)
    tensors = {"view": flat[2:6], "turned": flat.view(3, 4).t(), "one": tied, "two": tied, "none": torch.empty(0, 2)}
    old = os.umask(0o027)
    try:
        path = run.save(1, {"accelerator_1": Part({"model": tensors})}, {})
    finally:
        os.umask(old)
    found = run.load(path)[0]["accelerator_1"].tensors["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert {oct(file.stat().st_mode & 0o777) for file in files_of(run)} == {"0o640"}


def test_loaded_tensors_are_no_window_on_the_file(saved: RunFolder) -> None:
    for tensors in saved.load(saved.record(2))[0]["accelerator_1"].tensors.values():
        for tensor in tensors.values():
            tensor.add_(1)
    assert saved.damage(saved.record(2)) is None


def test_saving_a_step_again_leaves_it_alone(saved: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in files_of(saved)}
    save(saved, 2)
    assert {path: path.stat().st_mtime_ns for path in files_of(saved)} == before


def test_mistakes_of_the_caller(run: RunFolder) -> None:
    part = Part({"model": {"a": torch.ones(1)}})
    for parts, record in (
        ({"../up": part}, {}),
        ({"torch_units": part}, {}),
        ({"accelerator_1": Part({"a/b": {}})}, {}),
        ({"accelerator_1": Part()}, {}),
        ({"accelerator_1": part}, {"step": 3}),
    ):
        with pytest.raises(ValueError, match=r"file name|nothing in|written here"):
            run.save(1, parts, record)
    with pytest.raises(Exception, match=r"Unsupported|weights_only"):
        run.save(1, {"accelerator_1": part}, {"path": Path("x")})  # could be saved, but never loaded
    with pytest.raises(ValueError, match="at least 1"):
        run.prune(0)
    assert not run.folder.exists()


# -- retention -------------------------------------------------------------------------------------------------------


def test_prune_keeps_n_and_the_last_valid_one(run: RunFolder) -> None:
    for step in range(1, 7):
        save(run, step)
    run.prune(None)
    run.prune(4)
    assert run.steps() == [6, 5, 4, 3]
    for step in (6, 5):
        (run.folder / f"accelerator_1/step-{step}/model.safetensors").unlink()
    run.prune(2)
    assert run.steps() == [6, 5, 4]  # 4 is the last valid one
    run.prune(1)
    assert run.latest() == run.record(4)
    save(run, 7)
    run.prune(1)
    assert run.steps() == [7]
    assert sorted(path.name for path in run.folder.glob("*/*")) == ["step-7", "step-7", "step-7.pt"]


def test_prune_spares_the_newest_that_is_known_to_be_good(run: RunFolder) -> None:
    for step in range(1, 7):
        save(run, step)
    run.prune(2, good=4)
    assert run.steps() == [6, 5, 4]
    save(run, 7)
    run.prune(1, good=4)
    assert run.steps() == [7, 4]
    run.prune(1, good=3)  # nothing is left that is so old
    assert run.steps() == [7]


def test_prune_survives_what_it_cannot_remove(
    saved: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def before(operation: str, path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage, "before", before)
    saved.prune(1)
    assert "cannot remove the old checkpoint of step 1" in caplog.text
    assert saved.latest() == saved.record(2)


def test_clean_removes_only_what_saves_left(saved: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    (saved.folder / "notes").mkdir()
    (saved.folder / "notes" / "step-by-step.txt").touch()
    (saved.folder / "accelerator_1" / "step-9").mkdir()
    (saved.folder / "accelerator_1" / "step-9" / "link").symlink_to(elsewhere)
    (saved.folder / "accelerator_2" / ".tmp-step-9").mkdir()
    (saved.folder / "torch_units" / ".tmp-step-9.pt").touch()
    assert saved.clean() == [
        "checkpoints/accelerator_1/step-9",
        "checkpoints/accelerator_2/.tmp-step-9",
        "checkpoints/torch_units/.tmp-step-9.pt",
    ]
    assert (elsewhere / "mine").exists()
    assert (saved.folder / "notes" / "step-by-step.txt").exists()
    assert_holds(saved, saved.record(2), 2)


# -- one run a folder ------------------------------------------------------------------------------------------------


def holder(run: RunFolder, *, orphan: bool = False) -> int:
    """The pid of another process that holds the lock; of the child that inherited it from a dead one, if ``orphan``."""
    run.root.mkdir(parents=True, exist_ok=True)
    answer, tell = os.pipe()
    if (first := os.fork()) == 0:
        try:
            storage.take_lock(run.root / ".lock")
            if orphan and os.fork():
                os._exit(0)
            os.write(tell, str(os.getpid()).encode())
            time.sleep(600)
        finally:
            os._exit(1)
    if orphan:
        os.waitpid(first, 0)
    return int(os.read(answer, 100))


def test_a_second_run_is_refused_and_a_stale_lock_is_not(run: RunFolder) -> None:
    pid = holder(run)
    try:
        with pytest.raises(UserError, match=f"process {pid} on {os.uname().nodename}") as error, run.lock():
            pass
        assert error.value.exit_code == EXIT_LOCKED
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert str(pid) in (run.root / ".lock").read_text()  # killed: its name is still there
    with run.lock(), pytest.raises(UserError, match=f"process {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass
    assert (run.root / ".lock").read_text() == ""


@pytest.mark.timeout(60)
def test_an_orphaned_child_does_not_hold_the_run(run: RunFolder) -> None:
    child = holder(run, orphan=True)
    try:
        with run.lock():
            assert (run.root / ".lock").read_text().split()[1] == str(os.getpid())
            with pytest.raises(UserError, match="in use"), run.lock():
                pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match="cannot write to the output folder") as error, RunFolder(root).lock():
            pass
        assert error.value.exit_code == EXIT_USER
