"""Runs that are killed, stopped by a signal, or meet a full disk: what is left resumes to the same bits.

Children are forked from this process, so that a trial costs no import.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import tiny
import torch
from forked import Child, InSave, begun, die, ticks, until

from train_t2i import storage
from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_DISK, EXIT_LOCKED, EXIT_PREEMPTED

STEPS = 4
FLAGS = f"--batch-size 1 --max-train-steps {STEPS} --checkpoint-steps 1 --auto-resume"
pytestmark = pytest.mark.usefixtures("one_thread_before_a_fork")


def start(trainer, name: str, more: str = FLAGS, before: Callable[[], object] = lambda: None, method="dmdr") -> Child:
    return forked.train(trainer.arguments(name, more, method), trainer.root / f"{name}.out", before)


def assert_is(whole: Path, run: Path, step: int = STEPS) -> None:
    """Bitwise the uninterrupted result, and nothing half-written beside it."""
    tiny.assert_same_checkpoint(whole, run, step)
    tiny.assert_same_logs(whole, run)
    assert RunFolder(run).steps() == RunFolder(whole).steps()
    assert all(RunFolder(run).damage(RunFolder(run).record(step)) is None for step in RunFolder(run).steps())
    assert not list((run / "checkpoints").glob("*/.tmp-*"))
    assert (run / ".exit_code").read_text() == "0\n"


@pytest.fixture
def whole(trainer) -> Path:
    return trainer.run("whole", FLAGS)


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def test_killed_at_random_again_and_again(trainer, whole):
    """The same command each time, killed at any instant of its life; some kills land before the first checkpoint."""
    begun = time.monotonic()
    assert start(trainer, "timed").ends() == 0
    life_s, chance = time.monotonic() - begun, random.Random(1)
    kills = {"killed": 0, "ended before": 0}
    for _ in range(8):
        child = start(trainer, "run")
        time.sleep(life_s * chance.uniform(0.05, 0.9))
        child.send(signal.SIGKILL)
        killed = child.ends() == -signal.SIGKILL
        kills["killed" if killed else "ended before"] += 1
        if not killed:
            assert child.code == 0, child.said()
            break
    assert kills["killed"] >= 1
    last = start(trainer, "run")
    assert last.ends() == 0, last.said()
    assert_is(whole, trainer.root / "run")
    assert "Traceback" not in last.said()


def operations_of_a_save(monkeypatch, trainer) -> int:
    """How many times a save changes the disk."""
    count = [0]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "before", lambda name, path: count.__setitem__(0, count[0] + ("step-1" in str(path))))
        trainer.run("counted", FLAGS + " --max-train-steps 1")
    return count[0]


def test_killed_inside_a_save(trainer, whole, monkeypatch):
    """At the first change of the disk, at the last, and between; a checkpoint is complete or it is not there."""
    count = operations_of_a_save(monkeypatch, trainer)
    assert count > 20
    for nth in sorted({1, 2, count // 3, count // 2, count - 1, count}):
        name = f"killed-{nth}"
        child = start(trainer, name, before=lambda nth=nth: setattr(storage, "before", InSave(2, nth, die)))
        assert child.ends() == -signal.SIGKILL
        run = trainer.root / name
        steps = RunFolder(run).steps()
        assert steps in ([1], [2, 1])
        assert all(RunFolder(run).damage(RunFolder(run).record(step)) is None for step in steps)
        again = trainer.run(name, FLAGS)
        assert_is(whole, again)


def test_a_prune_that_was_killed_after_the_last_step_is_done_by_the_next_start(trainer):
    """Nothing is left to train then, and nothing to save."""
    flags = FLAGS + " --checkpoints-total-limit 1"

    def die_in_the_last_prune(operation: str, path: Path) -> None:
        if operation == "unlink" and path.name == f"step-{STEPS - 1}.pt":
            die()

    child = start(trainer, "run", flags, before=lambda: setattr(storage, "before", die_in_the_last_prune))
    assert child.ends() == -signal.SIGKILL
    run = RunFolder(trainer.root / "run")
    assert run.steps() == [STEPS, STEPS - 1]
    trainer.run("run", flags)
    assert run.steps() == [STEPS]


# -- signals ---------------------------------------------------------------------------------------------------------


def slow_rollouts() -> None:
    from train_t2i.methods import DMDR

    rollout = DMDR.rollout

    def slow(self, *arguments):
        time.sleep(0.3)
        return rollout(self, *arguments)

    DMDR.rollout = slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_runs_on_to_the_step_boundary_saves_and_can_be_resumed(trainer, number):
    flags = "--batch-size 1 --max-train-steps 3 --ratio-update 4 --auto-resume"
    whole = trainer.run("whole", flags)
    # slow, so that on a busy machine too the signal comes before the end
    child, run = start(trainer, "run", flags, before=slow_rollouts), trainer.root / "run"
    until(child, lambda: ticks(run) >= 1)
    child.send(number)
    assert child.ends() == EXIT_PREEMPTED, child.said()
    assert "Traceback" not in child.said()
    assert (run / ".exit_code").read_text() == f"{EXIT_PREEMPTED}\n"
    (step,) = RunFolder(run).steps()
    assert step < 3
    record = torch.load(RunFolder(run).record(step), weights_only=True)
    assert record["tick"] == 4 * step
    assert ticks(run) == 4 * step
    assert "stopped by a signal" in (run / "log.txt").read_text()
    again = trainer.run("run", flags)
    tiny.assert_same_checkpoint(whole, again, 3)
    tiny.assert_same_logs(whole, again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(trainer, number):
    flags = "--batch-size 1 --max-train-steps 2 --ratio-update 500 --auto-resume"
    child = start(trainer, "run", flags, before=slow_rollouts)
    until(child, lambda: begun(trainer.root / "run"))
    child.send(number)
    child.send(number)  # `timeout` signals the process and its group: that is one request
    time.sleep(0.6)
    assert child.alive()  # the boundary is minutes away
    child.send(number)
    assert child.ends() == 128 + number
    assert RunFolder(trainer.root / "run").steps() == []


def test_a_signal_sent_twice_at_once_is_one_request(monkeypatch):
    from train_t2i import run

    left, now = [], [100.0]
    monkeypatch.setattr(run.os, "_exit", left.append)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    stop = run.StopRequest()
    for wait_s in (0.0, 0.0, 0.05, 0.1):
        now[0] += wait_s
        stop._on_signal(signal.SIGTERM, None)
        assert stop.asked
    assert left == []
    now[0] += 0.2
    stop._on_signal(signal.SIGINT, None)
    assert left == [130]


@pytest.mark.parametrize(("launcher", "asked"), [({}, False), ({"TORCHELASTIC_RUN_ID": "none"}, True)])
def test_a_run_under_nohup_outlives_its_terminal(monkeypatch, launcher, asked):
    """Unless torch's launcher passes the hang-up on: it ends then, and kills what does not."""
    from train_t2i import run

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked == asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_models_load_stops_after_the_first_step(trainer):
    child = start(trainer, "run", FLAGS + " --checkpoint-steps 0", before=lambda: os.kill(os.getpid(), signal.SIGCONT))
    until(child, lambda: (trainer.root / "run" / ".lock").exists())
    child.send(signal.SIGTERM)
    assert child.ends() == EXIT_PREEMPTED, child.said()
    assert RunFolder(trainer.root / "run").steps() == [1]


def test_a_folder_in_use_is_refused(trainer):
    child = start(trainer, "run", "--batch-size 1 --max-train-steps 2 --ratio-update 500", before=slow_rollouts)
    until(child, lambda: begun(trainer.root / "run"))
    ended = trainer.ends("run", "--auto-resume")
    child.send(signal.SIGKILL)
    child.ends()
    assert ended.code == EXIT_LOCKED
    assert str(child.pid) in ended.err


# -- a full disk -----------------------------------------------------------------------------------------------------


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_files() -> None:
    """From now on no file may grow past 64 kB: the kernel's own refusal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("nth", "action"), [(3, full), (12, full), (1, limit_files)])
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(trainer, whole, nth, action):
    child = start(trainer, "run", before=lambda: setattr(storage, "before", InSave(2, nth, action)))
    assert child.ends() == EXIT_DISK
    said, run = child.said(), trainer.root / "run"
    assert "cannot save step 2" in said
    assert "the checkpoint of step 1 is intact" in said
    assert "--auto-resume" in said
    assert "Traceback" not in said
    assert RunFolder(run).steps() == [1]
    assert RunFolder(run).damage(RunFolder(run).record(1)) is None
    assert not list((run / "checkpoints").glob("*/*step-2*"))
    assert (run / ".exit_code").read_text() == f"{EXIT_DISK}\n"
    assert_is(whole, trainer.run("run", FLAGS))


# -- the program as people start it ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_command(trainer, whole):
    """python -m train_t2i train: its exit code is the process's."""
    command = [sys.executable, "-m", "train_t2i", *trainer.arguments("run", FLAGS)]
    root, environment = Path(__file__).parents[1], {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while ticks(trainer.root / "run") < 1 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED, said
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    run = trainer.root / "run"
    assert [line["tick"] for line in tiny.log_lines(run, "guidance")] == list(range(1, 2 * STEPS + 1))
    assert RunFolder(run).steps()[0] == STEPS


@pytest.mark.slow
def test_many_random_kills(trainer, whole):
    """Twenty lives of a run, each killed at random."""
    begun = time.monotonic()
    assert start(trainer, "timed").ends() == 0
    life_s, chance, tally = time.monotonic() - begun, random.Random(2), {"killed": 0, "finished": 0}
    while tally["killed"] < 20:
        child = start(trainer, "run")
        time.sleep(life_s * chance.uniform(0.02, 1.0))
        child.send(signal.SIGKILL)
        if child.ends() == -signal.SIGKILL:
            tally["killed"] += 1
            continue
        assert child.code == 0, child.said()
        assert_is(whole, trainer.root / "run")
        tally["finished"] += 1
        shutil.rmtree(trainer.root / "run")
    assert start(trainer, "run").ends() == 0
    assert_is(whole, trainer.root / "run")
