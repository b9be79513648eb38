"""Checkpoints: every crash point, every damage, a full disk, two runs on one folder, and exact optimizer state."""

import errno
import io
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from train_t2i import storage
from train_t2i.checkpoint import Part, RunFolder, run_of
from train_t2i.errors import EXIT_DISK, EXIT_LOCKED, EXIT_USER, UserError
from train_t2i.optimizer_state import load_optimizer, optimizer_part

CRASHED = 9


def parts_at(step: int) -> dict[str, Part]:
    """Two parts of a few hundred bytes whose contents tell the step."""
    weights = {"a.weight": torch.full((3, 4), float(step)), "b": torch.tensor(step), "c": torch.ones(5).bfloat16()}
    return {
        "accelerator_1": Part({"model": weights, "optimizer": {"a.weight/exp_avg": torch.arange(step, step + 6.0)}}),
        "accelerator_2": Part(
            {"model": {"x": torch.full((2,), -float(step))}}, {"optimizer": {"step": step, "lr": [0.1]}}
        ),
    }


def save(run: RunFolder, step: int) -> Path:
    return run.save(step, parts_at(step), {"tick": 5 * step, "config": {"seed": 1, "name": "x"}})


def assert_holds(run: RunFolder, path: Path, step: int) -> None:
    parts, record = run.load(path)
    assert (record["step"], record["tick"], record["config"]) == (step, 5 * step, {"seed": 1, "name": "x"})
    expected = parts_at(step)
    assert parts.keys() == expected.keys()
    for name, part in expected.items():
        assert parts[name].values == part.values
        assert parts[name].tensors.keys() == part.tensors.keys()
        for stem, tensors in part.tensors.items():
            found = parts[name].tensors[stem]
            assert found.keys() == tensors.keys()
            assert all(
                torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors.items()
            )


def files_of(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flushes asked of the kernel, which are not waited for: a killed process loses nothing that was written."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def saved(run: RunFolder) -> RunFolder:
    save(run, 1)
    save(run, 2)
    return run


# ---------------------------------------------------------------- what is on the disk


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


# ---------------------------------------------------------------- crashes


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


# ---------------------------------------------------------------- full disks


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


# ---------------------------------------------------------------- damage


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def assert_refused(run: RunFolder, path: Path, word: str) -> None:
    with pytest.raises(UserError) as error:
        run.load(path)
    assert error.value.exit_code == EXIT_USER
    assert "\n" not in str(error.value)
    assert word in error.value.message


def test_every_flipped_bit_is_seen(saved: RunFolder) -> None:
    generator = torch.Generator().manual_seed(0)
    for path in [path for path in files_of(saved) if "step-2" in str(path)]:
        whole = path.read_bytes()
        bits = torch.randint(8 * len(whole), (64,), generator=generator).tolist()
        for bit in [0, 8 * len(whole) - 1, *bits]:
            flip(path, bit)
            assert saved.damage(saved.record(2)), (path, bit)
            path.write_bytes(whole)
    assert saved.damage(saved.record(2)) is None


@pytest.mark.parametrize("damage", ["empty", "half", "byte", "longer", "zeros", "html", "deleted", "swapped", "folder"])
def test_damage_falls_back_with_a_warning_and_refuses_by_name(
    saved: RunFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in [path for path in files_of(saved) if "step-2" in str(path)]:
        whole = path.read_bytes()
        other = Path(str(path).replace("step-2", "step-1")).read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "deleted":
            broken = {
                "empty": b"",
                "half": whole[: len(whole) // 2],
                "byte": whole[:-1],
                "longer": whole + b"\0",
                "zeros": bytes(len(whole)),
                "html": b"<!DOCTYPE html><html></html>",
                "swapped": other,
            }
            path.write_bytes(broken[damage])
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert saved.latest() == saved.record(1)
        if path.suffix == ".pt" and damage == "deleted":
            assert not caplog.records  # no record, no checkpoint: nothing was damaged
        else:
            assert path.name in caplog.text
            assert "step 2" in caplog.text
        assert_refused(saved, saved.record(2), path.name)
        shutil.rmtree(path) if damage == "folder" else path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert_holds(saved, saved.record(2), 2)


def sealed(content: object) -> bytes:
    """``content`` as torch.save writes it, under a digest that is right."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()[:-2] + storage.SEAL_BYTES.to_bytes(2, "little")
    return body + storage.SEAL + xxhash.xxh3_128_hexdigest(body).encode()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_record_never_runs(saved: RunFolder, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    good = storage.read_record(saved.record(2))
    torch.save({**good, "x": Canary(canary)}, saved.record(2))
    assert_refused(saved, saved.record(2), "step-2.pt")
    saved.record(2).write_bytes(sealed({**good, "x": Canary(canary)}))
    assert_refused(saved, saved.record(2), "step-2.pt")
    assert saved.latest() == saved.record(1)
    assert not canary.exists()
    torch.load(saved.record(2), weights_only=False)  # the trap does work
    assert canary.exists()


def test_a_record_of_the_wrong_kind(saved: RunFolder) -> None:
    good = storage.read_record(saved.record(2))
    outside = {"../../../etc/step-2/x.json": [1, "0"]}
    for content in (
        [1, 2],
        {"state_dict": torch.ones(2)},
        {**good, "step": 1},
        {**good, "manifest": outside},
        {**good, "manifest": {"accelerator_1/step-1/model.safetensors": good["manifest"].popitem()[1]}},
        {**good, "manifest": {"accelerator_1/step-2/model.safetensors": 3}},
        {**good, "manifest": None},
    ):
        saved.record(2).write_bytes(sealed(content))
        assert_refused(saved, saved.record(2), "step-2.pt")
    saved.record(2).write_bytes(sealed({**good, "version": 99}))
    assert_refused(saved, saved.record(2), "newer version")


def test_paths_that_a_person_gives(saved: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.folder / "torch_units")
    link = tmp_path / "best.pt"
    link.symlink_to(saved.record(1))
    for given in (saved.record(1), Path("step-1.pt"), Path("../torch_units/../torch_units/step-1.pt"), link):
        assert_holds(run_of(given), given if given != link else link.resolve(), 1)
    for wrong in ("x.pt", "torch_units/step-1.pt", "step-1.safetensors", "step-01.pt", "/", ""):
        with pytest.raises(UserError, match="not a checkpoint of a run"):
            run_of(tmp_path / wrong)
    assert_refused(saved, saved.record(7), "no checkpoint at")
    assert RunFolder(tmp_path / "none").latest() is None
    assert RunFolder(tmp_path / "none").clean() == []


# ---------------------------------------------------------------- retention


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


# ---------------------------------------------------------------- one run a folder


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


# ---------------------------------------------------------------- optimizers


class EightBit(torch.optim.Optimizer):
    """State as bitsandbytes keeps it: bytes, a table, and a Python number."""

    def __init__(self, parameters, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(
                        step=0, state1=torch.zeros_like(parameter, dtype=torch.uint8), qmap1=torch.linspace(-1, 1, 256)
                    )
                state["step"] += 1
                state["state1"] += (parameter.grad.abs() * 50).byte()
                parameter.data -= group["lr"] * state["qmap1"][state["state1"].long()] / state["step"]


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MAKERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "eight_bit": EightBit,
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_bitwise_with_the_parameters_in_another_order(
    run: RunFolder, maker: Callable, dtype: torch.dtype
) -> None:
    straight = model_of(0, dtype)
    train(straight, optimizer := maker(straight.parameters()), 0, 3)
    tensors, values = optimizer_part(optimizer, dict(straight.named_parameters()))
    part = Part({"model": straight.state_dict(), "optimizer": tensors}, {"optimizer": values})
    path = run.save(3, {"accelerator_1": part}, {})
    train(straight, optimizer, 3, 7)

    found = run.load(path)[0]["accelerator_1"]
    resumed = model_of(1, dtype)
    optimizer = maker(list(resumed.parameters())[::-1])
    train(resumed, optimizer, 20, 21)  # state that must go
    resumed.load_state_dict(found.tensors["model"])
    load_optimizer(optimizer, dict(resumed.named_parameters()), found.tensors["optimizer"], found.values["optimizer"])
    train(resumed, optimizer, 3, 7)
    for (name, parameter), other in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(parameter, other), name


def test_state_keeps_its_own_dtype_and_the_learning_rate_comes_from_the_config() -> None:
    model = model_of(0, torch.bfloat16)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 0, 1)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-7  # fp32 moments of a bf16 weight
    other = torch.optim.AdamW(model.parameters(), lr=0.03)
    load_optimizer(other, parameters, *optimizer_part(optimizer, parameters))
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)
            assert other.state[parameter][key].dtype == value.dtype
            assert other.state[parameter][key] is not value
    assert other.param_groups[0]["lr"] == 0.03


def test_parameters_without_state_and_optimizers_that_do_not_fit() -> None:
    model = model_of(0)
    parameters = dict(model.named_parameters())
    fresh = torch.optim.AdamW(model.parameters())
    saved = optimizer_part(fresh, parameters)
    used = torch.optim.AdamW(model.parameters())
    train(model, used, 0, 1)
    load_optimizer(used, parameters, *saved)
    assert not used.state
    with pytest.raises(UserError, match="state of AdamW, this run trains with EightBit"):
        load_optimizer(EightBit(model.parameters()), parameters, *saved)
    with pytest.raises(UserError, match=r"0\.bias and 1 more are in one only"):
        load_optimizer(torch.optim.AdamW(model[2].parameters()), parameters, *saved)
    with pytest.raises(ValueError, match="4 parameters without a name"):
        optimizer_part(fresh, {})
