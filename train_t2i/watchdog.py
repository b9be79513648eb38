"""A process that stands still says where, and leaves: one line, the stacks of all its threads, exit code 6.

Processes that train together wait for each other, so all of them stand still when one does.  Each watches itself alone,
without a message to the others: all write their stacks, and the one that waits for nobody is the cause.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from train_t2i.errors import EXIT_HANG

FIRST_STEP = 3  # times as patient until the first step is over: models load, kernels are built and tuned
LINGER_SECONDS = 30.0  # between the stacks and the end, so that the others are not told of a lost process instead
STDERR = 2
PACKAGES = ("train_t2i", "rewards")


def longest_wait_s(seconds: float) -> float:
    """How long a collective may wait before torch gives it up: longer than any watchdog, which says more."""
    return (FIRST_STEP + 1) * seconds + 2 * LINGER_SECONDS if seconds else 365 * 24 * 3600.0


class Watchdog:
    """Ends this process when no ``beat`` came for ``seconds`` (0: never).  ``root`` is the run's folder."""

    def __init__(self, root: Path, seconds: float, rank: int) -> None:
        self.root, self.seconds, self.rank, self.host = root, seconds, rank, socket.gethostname()
        self._last = ("meet", 0, 0, time.monotonic())
        self._first_step: int | None = None
        self._patience = 1
        self._over = threading.Event()
        self.fired = False  # this process is about to end: how it ended is said already
        # torch's launcher, when killed, takes nobody with it: its processes would train on and keep the folder locked
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.seconds:
            self._thread.join()

    def met(self) -> None:
        """All processes are there: models load now, and the first step follows."""
        self._patience, self._last = FIRST_STEP, ("load", 0, 0, time.monotonic())

    def beat(self, phase: str, tick: int, step: int) -> None:
        """The loop goes on: ``phase`` begins after so many ticks and steps."""
        if self._first_step is None:
            self._first_step = step
        elif step != self._first_step:
            self._patience = 1
        self._last = (phase, tick, step, time.monotonic())

    @property
    def file(self) -> Path:
        return self.root / "stacks" / f"rank-{self.rank}-{re.sub(r'[^A-Za-z0-9.-]', '_', self.host)}.txt"

    def _watch(self) -> None:
        interval = min(5.0, self.seconds / 10)
        while True:
            # should a thread keep the interpreter to itself, this one cannot run: C writes the stacks then and leaves with 1
            faulthandler.dump_traceback_later(self._patience * self.seconds + 2 * interval, exit=True, file=STDERR)
            if self._over.wait(interval):
                return faulthandler.cancel_dump_traceback_later()
            if self._launcher and os.getppid() != self._launcher:
                self._launcher = 0
                _tell(f"rank {self.rank} on {self.host}: its launcher is gone, which asks for a stop\n")
                os.kill(os.getpid(), signal.SIGTERM)
            phase, tick, step, since = self._last
            if (age := time.monotonic() - since) > self._patience * self.seconds:
                self._leave(f"phase {phase} after {tick} ticks and {step} steps", age)

    def _leave(self, phase: str, age_s: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.fired = True
        begun = datetime.fromtimestamp(time.time() - age_s, UTC)
        frames = dict(sys._current_frames())
        line = (
            f"error: rank {self.rank} on {self.host} stood still for {age_s:.0f} s, since {begun:%Y-%m-%d %H:%M:%S} UTC: "
            f"{phase}, {place(frames[threading.main_thread().ident or 0])}"
        )
        hint = f"hint: the stacks of its threads are in {self.file}; run the same command with --auto-resume"
        text = f"{line}\n{hint}\n{stacks(frames)}"
        # the disk or the terminal may be what stands still: neither is waited for
        for work in (_tell, self._write):
            threading.Thread(target=work, args=(text,), daemon=True).start()
        time.sleep(min(LINGER_SECONDS, self.seconds / 2))
        os._exit(EXIT_HANG)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(text, encoding="utf-8")
        if self.rank == 0:
            with contextlib.suppress(OSError):
                (self.root / ".exit_code").write_text(f"{EXIT_HANG}\n")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(STDERR, text.encode())


def place(frame: FrameType) -> str:
    """Where a thread is in our own code, and whether it waits there for other processes.  Reads no file."""
    frames = [entry for entry, _ in traceback.walk_stack(frame)]
    ours = next((entry for entry in frames if _module(entry).split(".")[0] in PACKAGES), frames[0])
    waits = any(_module(entry).startswith("torch.distributed") for entry in frames)
    what = "waiting for the other processes" if waits else "not waiting for another process"
    return f"{what}, at {Path(ours.f_code.co_filename).name}:{ours.f_lineno} ({ours.f_code.co_name})"


def stacks(frames: dict[int, FrameType]) -> str:
    """The stacks of all threads, innermost call first.  Reads no file, which could be on the disk that stands still."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in frames.items():
        lines.append(f"\nThread {names.get(ident, ident)}, innermost call first:")
        calls = traceback.walk_stack(frame)
        lines += [f"  {entry.f_code.co_filename}:{line} in {entry.f_code.co_name}" for entry, line in calls]
    return "\n".join(lines) + "\n"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
