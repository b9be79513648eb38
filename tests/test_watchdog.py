"""The watchdog on its own, in processes that it may end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from forked import Child

from train_t2i.errors import EXIT_HANG
from train_t2i.watchdog import FIRST_STEP, Watchdog, longest_wait_s, place

SECONDS = 1.0


def guarded(root: Path, work: Callable[[Watchdog], object], seconds: float = SECONDS, rank: int = 0) -> Child:
    def run() -> int:
        with Watchdog(root, seconds, rank) as watch:
            work(watch)
        return 0

    return forked.fork(run, root / "said")


def past_the_first_step(watch: Watchdog) -> None:
    watch.beat("tick", 0, 0)
    watch.beat("tick", 1, 1)


def test_a_loop_that_goes_on_is_left_alone(tmp_path):
    """However long it takes in all, and whatever comes after it."""

    def work(watch: Watchdog) -> None:
        for tick in range(6):
            watch.beat("tick", tick, tick)
            time.sleep(SECONDS / 4)

    def after(watch: Watchdog) -> None:
        watch.__exit__()
        time.sleep(3 * SECONDS)

    assert guarded(tmp_path, work).ends(20) == 0
    assert guarded(tmp_path, lambda watch: (past_the_first_step(watch), after(watch))).ends(20) == 0
    assert (tmp_path / "said").read_text() == ""
    assert not (tmp_path / "stacks").exists()


def test_the_first_step_is_given_more_time(tmp_path):
    def slow_start(watch: Watchdog) -> None:
        watch.met()
        time.sleep(2 * SECONDS)
        watch.beat("tick", 0, 5)
        time.sleep(2 * SECONDS)
        watch.beat("tick", 1, 5)  # the guidance network's updates come before the generator's
        time.sleep(2 * SECONDS)
        watch.beat("save", 2, 6)

    assert guarded(tmp_path, slow_start).ends(20) == 0
    begun = time.monotonic()
    assert guarded(tmp_path, lambda watch: (watch.met(), asleep())).ends(20) == EXIT_HANG
    assert time.monotonic() - begun > FIRST_STEP * SECONDS
    assert "phase load after 0 ticks and 0 steps" in (tmp_path / "said").read_text()


def test_others_that_never_come_are_not_given_more_time(tmp_path):
    begun = time.monotonic()
    assert guarded(tmp_path, lambda watch: asleep()).ends(20) == EXIT_HANG
    assert time.monotonic() - begun < FIRST_STEP * SECONDS
    assert "phase meet after 0 ticks and 0 steps" in (tmp_path / "said").read_text()


def test_every_thread_is_in_the_stacks_and_only_the_main_process_writes_the_code(tmp_path):
    def hang(watch: Watchdog) -> None:
        past_the_first_step(watch)
        threading.Thread(target=asleep, name="reader", daemon=True).start()
        asleep()

    for rank in (0, 1):
        assert guarded(tmp_path, hang, rank=rank).ends(20) == EXIT_HANG
        (file,) = (tmp_path / "stacks").glob(f"rank-{rank}-*.txt")
        text = file.read_text()
        assert text.startswith(f"error: rank {rank} on ")
        assert text.splitlines()[1].startswith(f"hint: the stacks of its threads are in {file}; run the same command")
        assert "Thread MainThread, innermost" in text
        assert "Thread reader, innermost" in text
        assert text.count(f"in {asleep.__name__}") == 2
        marker = tmp_path / ".exit_code"
        assert marker.exists() == (rank == 0)
        marker.unlink(missing_ok=True)


def asleep() -> None:
    time.sleep(60)


def test_a_disk_that_stands_still_is_not_waited_for(tmp_path):
    """A pipe that nobody reads is where the stacks should go."""
    os.mkfifo(tmp_path / ".exit_code")

    def hang(watch: Watchdog) -> None:
        past_the_first_step(watch)
        watch.file.parent.mkdir()
        os.mkfifo(watch.file)
        asleep()

    assert guarded(tmp_path, hang).ends(20) == EXIT_HANG
    assert "stood still" in (tmp_path / "said").read_text()


def test_a_thread_that_keeps_the_interpreter_to_itself(tmp_path):
    """No Python runs then, so that the code is 1 and the stacks are on the terminal alone."""

    def hang(watch: Watchdog) -> None:
        past_the_first_step(watch)
        time.sleep(SECONDS / 2)  # the watching thread has seen it
        ctypes.PyDLL(None).sleep(60)

    assert guarded(tmp_path, hang).ends(20) == 1
    said = (tmp_path / "said").read_text()
    assert "Timeout (" in said
    assert "in hang" in said


def test_0_is_never(tmp_path):
    assert guarded(tmp_path, lambda watch: time.sleep(1), seconds=0).ends(20) == 0
    assert longest_wait_s(0) > 1e7


@pytest.mark.parametrize("seconds", [1, 60, 1800])
def test_torch_gives_up_later_than_the_watchdog(seconds):
    watch = Watchdog(Path(), seconds, 0)
    watch.met()
    assert longest_wait_s(seconds) > watch._patience * seconds + 30


def test_what_a_thread_waits_for():
    def frame(module: str):
        space = {"__name__": module, "sys": sys}
        exec("def wait():\n    return sys._getframe()", space)  # noqa: S102
        return space["wait"]()

    assert place(frame("torch.distributed.distributed_c10d")).startswith("waiting for the other processes, at")
    assert place(frame("train_t2i.losses")).startswith("not waiting for another process, at <string>:2 (wait)")


@pytest.mark.parametrize(("launcher", "stopped"), [({"TORCHELASTIC_RUN_ID": "x"}, True), ({}, False)])
def test_a_process_whose_launcher_was_killed_is_asked_to_stop(tmp_path, monkeypatch, launcher, stopped):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    started = tmp_path / "started"

    def work(watch: Watchdog) -> None:
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
        started.touch()
        asked.wait(2)
        (tmp_path / "asked").write_text(str(asked.is_set()))

    def launch() -> int:
        guarded(tmp_path, work, seconds=5)
        time.sleep(60)
        return 0

    parent = forked.fork(launch, tmp_path / "launcher")
    forked.until(parent, started.exists)
    parent.send(signal.SIGKILL)
    end = time.monotonic() + 20
    while not (tmp_path / "asked").exists() or not (tmp_path / "asked").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (tmp_path / "asked").read_text() == str(stopped)
    assert ("its launcher is gone" in (tmp_path / "said").read_text()) == stopped
