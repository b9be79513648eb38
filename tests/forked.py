"""Training runs in processes of their own, forked from this one so that a trial costs no import; alone or as a world.

The parent keeps to one thread: OpenMP's do not survive a fork, and a child would wait for them for ever.  Nor do autograd's,
which it starts, if at all, at the first backward pass of a process: where a test has shown torch a GPU that is not there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

torch.ones((), requires_grad=True).backward()  # before any test: without a GPU it needs no thread


@dataclass
class Child:
    """A process that was forked off; its standard output and errors are in ``output``."""

    pid: int
    output: Path
    code: int | None = None

    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def send(self, number: int) -> None:
        if self.alive():
            os.kill(self.pid, number)

    def ends(self, within_s: float = 240) -> int:
        """Its exit code; one that takes longer is killed and fails the test."""
        end = time.monotonic() + within_s
        while self.alive():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end within {within_s} s: {self.said()}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def fork(work: Callable[[], int], output: Path) -> Child:
    """Run ``work`` in a process that ends with what it returns, or with 1 and a traceback."""
    if pid := os.fork():
        return Child(pid, output)
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed may hold it for ever
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def train(arguments: Sequence[str], output: Path, before: Callable[[], object] = lambda: None) -> Child:
    """A run on one process, which calls ``before`` first."""

    def work() -> int:
        from train_t2i.__main__ import main

        before()
        return main(arguments)

    return fork(work, output)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_world(
    arguments: Sequence[str],
    output: Path,
    world: int = 2,
    before: Callable[[int], object] = lambda rank: None,
    address: str = "127.0.0.1",
    interface: str = "lo",
) -> list[Child]:
    """A run on ``world`` processes, as a launcher would start them; each calls ``before(rank)`` first."""
    port = str(free_port())

    def join(rank: int) -> None:
        from accelerate import PartialState

        PartialState._reset_state()  # what this process knows of a run of its own
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": interface}
        os.environ["ACCELERATE_USE_CPU"] = "true"
        before(rank)

    return [
        train(arguments, output.with_name(f"{output.name}.{rank}"), before=lambda rank=rank: join(rank))
        for rank in range(world)
    ]


def until(child: Child, condition: Callable[[], object], limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert child.alive(), f"ended with {child.code} too early: {child.said()}"
        assert time.monotonic() < end, child.said()
        time.sleep(0.01)


def begun(root: Path) -> bool:
    """Whether a run has all that it needs, and ticks or is about to: ticks are logged when their step is done."""
    file = root / "log.txt"
    return file.exists() and "trained parameters" in file.read_text()


def ticks(root: Path) -> int:
    """How many ticks a run has logged, those of finished steps."""
    file = root / "loss_logs" / "loss_gui_log.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class InSave:
    """At the n-th change of the disk in the save of a step, do something."""

    def __init__(self, step: int, nth: int, action: Callable[[], object]) -> None:
        self.name, self.left, self.action = f"step-{step}", nth, action

    def __call__(self, operation: str, path: Path) -> None:
        if self.name in str(path):
            self.left -= 1
            if self.left == 0:
                self.action()
