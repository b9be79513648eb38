"""Two processes, of which one dies, stands still, or is cut off: the other ends soon and says so, and the run goes on."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import tiny
from forked import Child, InSave, die, ticks

from train_t2i import storage
from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_DISK, EXIT_HANG, EXIT_LOCKED, EXIT_LOST

STEPS = 3
FLAGS = f"--batch-size 1 --max-train-steps {STEPS} --checkpoint-steps 1 --auto-resume"
HOST = socket.gethostname()
pytestmark = pytest.mark.usefixtures("one_thread_before_a_fork")


def start(trainer, name: str, more: str = FLAGS, before: Callable[[int], object] = lambda rank: None) -> list[Child]:
    return forked.train_world(trainer.arguments(name, more), trainer.root / f"{name}.out", before=before)


def finish(trainer, name: str) -> Path:
    """The same command to its end."""
    children = start(trainer, name)
    assert [child.ends(60) for child in children] == [0, 0], children[0].said()
    return trainer.root / name


def assert_same_run(whole: Path, run: Path) -> None:
    assert RunFolder(run).steps() == RunFolder(whole).steps() == list(range(STEPS, 0, -1))
    for step in RunFolder(whole).steps():
        tiny.assert_same_checkpoint(whole, run, step)
    tiny.assert_same_logs(whole, run)


@pytest.fixture
def whole(trainer) -> Path:
    return finish(trainer, "whole")


def at_tick(tick: int, action: Callable[[], object]) -> None:
    """Do something in the middle of a tick: after the images are made, before the losses."""
    from train_t2i.methods import DMDR

    rollout = DMDR.rollout

    def acting(self, batch, clock):
        result = rollout(self, batch, clock)
        if clock.tick == tick:
            action()
        return result

    DMDR.rollout = acting


def in_save(nth: int, action: Callable[[], object]) -> None:
    """Do something at the n-th change of the disk in the save of step 2."""
    storage.before = InSave(2, nth, action)


# -- a process dies --------------------------------------------------------------------------------------------------

DEATHS = {
    "the worker in a tick": (1, lambda: at_tick(3, die)),
    "the main one in a tick": (0, lambda: at_tick(3, die)),
    "the main one in a save": (0, lambda: in_save(9, die)),
}


@pytest.mark.parametrize("death", DEATHS)
def test_the_other_process_ends_at_once_and_says_so(trainer, whole, death):
    dies, arm = DEATHS[death]
    children = start(trainer, "run", before=lambda rank: arm() if rank == dies else None)
    assert children[dies].ends(60) == -signal.SIGKILL
    survivor = children[1 - dies]
    assert survivor.ends(within_s=20) == EXIT_LOST
    said = survivor.said()
    assert re.search(rf"error: lost another process at 127\.0\.0\.1 \(this is rank {1 - dies} on {HOST}\): .+", said)
    assert "--auto-resume" in said
    assert "GLHF" not in said
    assert "Traceback" not in said
    run = trainer.root / "run"
    assert RunFolder(run).steps() == [1]
    if dies == 1:
        assert (run / ".exit_code").read_text() == f"{EXIT_LOST}\n"
    assert_same_run(whole, finish(trainer, "run"))


def test_a_worker_that_dies_during_a_save_leaves_a_complete_checkpoint(trainer, whole):
    """The main process ends its save, then finds nobody to go on with."""
    children: list[Child] = []

    def kill_the_other() -> None:
        os.kill(int((trainer.root / "worker.pid").read_text()), signal.SIGKILL)

    def arm(rank: int) -> None:
        if rank == 1:
            (trainer.root / "worker.pid").write_text(str(os.getpid()))
        else:
            in_save(9, kill_the_other)

    children = start(trainer, "run", before=arm)
    assert children[1].ends(60) == -signal.SIGKILL
    assert children[0].ends(within_s=20) == EXIT_LOST
    assert RunFolder(trainer.root / "run").latest() == RunFolder(trainer.root / "run").record(2)
    assert_same_run(whole, finish(trainer, "run"))


def test_an_error_on_one_process_is_its_own_and_a_loss_to_the_other(trainer):
    """A traceback where something is wrong with the program, and only there."""

    def wrong() -> None:
        raise RuntimeError("the program is wrong")

    children = start(trainer, "run", before=lambda rank: at_tick(1, wrong) if rank == 1 else None)
    assert children[1].ends(60) == 1
    assert "RuntimeError: the program is wrong" in children[1].said()
    assert children[0].ends(within_s=20) == EXIT_LOST
    assert "Traceback" not in children[0].said()


def test_a_killed_reader_of_images_is_told_in_one_line(trainer):
    flags = "--batch-size 1 --max-train-steps 500 --num-workers 1"
    child = forked.train(trainer.arguments("run", flags, "sft"), trainer.root / "run.out")
    forked.until(child, lambda: tiny.log_lines(trainer.root / "run"))
    readers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(readers) == 1
    os.kill(int(readers[0]), signal.SIGKILL)
    assert child.ends(within_s=20) == EXIT_LOST
    assert "error: a process that reads data was lost: DataLoader worker" in child.said()
    assert "Traceback" not in child.said()


# -- a process stands still ------------------------------------------------------------------------------------------

HANG = FLAGS + " --hang-seconds 3"


def asleep() -> None:
    time.sleep(300)


def stacks(run: Path, rank: int) -> str:
    return (run / "stacks" / f"rank-{rank}-{HOST}.txt").read_text()


def late_to_tick(tick: int) -> None:
    """Come a second after the others to a tick: the main process has written its log alone."""
    from train_t2i.log import RunLog

    flush = RunLog.end_tick

    def late(self, done, *counters):
        flush(self, done, *counters)
        time.sleep(1 if done == tick else 0)

    RunLog.end_tick = late


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_process_that_blocks_yields_the_stacks_of_all(trainer, whole, sleeper):
    """Also where the one that blocks began to wait before the other, and ends before it."""

    def arm(rank: int) -> None:
        at_tick(3, asleep) if rank == sleeper else late_to_tick(3)

    children = start(trainer, "run", HANG, before=arm)
    assert [child.ends(within_s=30) for child in children] == [EXIT_HANG, EXIT_HANG]
    run = trainer.root / "run"
    for rank, child in enumerate(children):
        text = stacks(run, rank)
        first = text.splitlines()[0]
        assert re.match(rf"error: rank {rank} on {HOST} stood still for [34] s, since \S+ \S+ UTC: ", first)
        assert "UTC: phase tick after 3 ticks and 1 steps, " in first
        assert (", waiting for the other processes, at" in first) == (rank != sleeper)
        assert "Thread MainThread, innermost call first:" in text
        assert ("in asleep" in text) == (rank == sleeper)
        assert text in child.said()
        assert "Traceback" not in child.said()
    assert (run / ".exit_code").read_text() == f"{EXIT_HANG}\n"
    assert_same_run(whole, finish(trainer, "run"))


def asleep_in_a_sheet() -> None:
    from train_t2i.sheet import SampleSheet

    SampleSheet._write = lambda self, rows, step: asleep() if step == 2 else None


@pytest.mark.parametrize(
    ("phase", "step", "arm"),
    [
        ("save", 3, lambda: in_save(9, asleep)),  # of step 2; the next save waits for it
        ("sample", 2, asleep_in_a_sheet),
    ],
)
def test_the_phase_that_blocks_is_named(trainer, phase, step, arm):
    children = start(trainer, "run", HANG + " --sample-steps 1", before=lambda rank: arm() if rank == 0 else None)
    assert [child.ends(within_s=30) for child in children] == [EXIT_HANG, EXIT_HANG]
    for rank in range(2):
        assert f": phase {phase} after {2 * step} ticks and {step} steps," in stacks(trainer.root / "run", rank)
    assert RunFolder(trainer.root / "run").steps() == [1]


def test_torch_gives_up_too_when_nobody_watches(trainer):
    """The time that the watchdog is given first, here shortened, is torch's own limit."""

    def arm(rank: int) -> None:
        from train_t2i import train

        train.longest_wait_s = lambda seconds: 3
        if rank == 1:
            at_tick(1, lambda: time.sleep(20))

    children = start(trainer, "run", before=arm)
    assert children[0].ends(within_s=18) == EXIT_LOST
    assert re.search(r"lost another process.*: Timed out waiting 3000ms", children[0].said())
    assert children[1].ends(within_s=60) == EXIT_LOST


# -- a full disk, a folder in use --------------------------------------------------------------------------------------


def test_a_disk_that_is_full_ends_all_processes(trainer, whole):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    children = start(trainer, "run", before=lambda rank: in_save(9, full) if rank == 0 else None)
    assert [child.ends(within_s=60) for child in children] == [EXIT_DISK, EXIT_DISK]
    assert "the checkpoint of step 1 is intact" in children[0].said()
    assert_same_run(whole, finish(trainer, "run"))


def test_a_second_launch_in_the_folder_ends_on_all_processes(trainer):
    flags = FLAGS.replace(f"{STEPS} ", "500 ")
    first = start(trainer, "run", flags)
    forked.until(first[0], lambda: ticks(trainer.root / "run") >= 1)
    arguments, output = trainer.arguments("run", flags), trainer.root / "second.out"
    second = forked.train_world(arguments, output)
    codes = [child.ends(60) for child in second]
    alive = [child.alive() for child in first]
    for child in first:
        child.send(signal.SIGKILL)
        child.ends()
    assert alive == [True, True]
    assert codes == [EXIT_LOCKED, EXIT_LOST]
    assert f"in use by another run: process {first[0].pid} on {HOST}" in second[0].said()
