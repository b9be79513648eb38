"""Starts all nodes, shows what they say in one place, and stops all of them when one fails or a signal comes."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from train_t2i import redact
from train_t2i.errors import UserError
from train_t2i.launch import command
from train_t2i.launch.nodes import Launch, Node

BEAT_S = 2  # how often a node hears that the master is there
LAST_GRACE_S = 30  # after a second signal
REPEAT_SECONDS = 0.3  # `timeout` sends one signal twice: to the process and to its group
SETTLE_S = 2  # from the first bad end to the stop of the others: their own ends are told as well
END_S = 5  # from the SIGKILL on a node to its connection's end; then the connection itself is killed
LINE_BYTES = 1 << 16
# What tells most about a failure, the best first; torch's launcher says the second of a process that was killed
TELLING = (
    re.compile(rb"^error: "),
    re.compile(rb"Signal \d+ \(SIG\w+\)"),
    re.compile(rb"^(\[rank\d+\]: *)?[\w.]*(Error|Exception): "),
)
SSH_LOST = 255
SAY = threading.Lock()  # one line at a time


def say(line: bytes, out: BinaryIO | None = None) -> None:
    """A whole line, at once; a reader that is gone is no reason to stop."""
    with SAY, contextlib.suppress(OSError, ValueError):
        out = out or sys.stdout.buffer
        out.write(line if line.endswith(b"\n") else line + b"\n")
        out.flush()


def tell(text: str) -> None:
    say(f"launch: {text}".encode(errors="replace"), sys.stderr.buffer)


class Member:
    """A node's part: its process here (bash or ssh), its output, how it ended."""

    def __init__(self, node: Node, argv: list[str], log: Path) -> None:
        self.node, self.log = node, log
        self.code: int | None = None  # none: running
        self.lost = self.stopped = False  # by a connection that broke; by us
        self.reason, self._reason_rank = "", len(TELLING)
        self._out = log.open("ab")
        # a session of its own: Ctrl-C in the terminal reaches this program alone
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._said = self._process.stdin, self._process.stdout
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        prefix = f"[{self.node.rank} {self.node.host}] ".encode()
        for said in iter(lambda: self._said.readline(LINE_BYTES), b""):
            line = redact.clean_bytes(said)
            with contextlib.suppress(OSError):  # a full disk here; the run goes on
                self._out.write(line)
                self._out.flush()
            self._note(line)
            say(prefix + line)

    def _note(self, line: bytes) -> None:
        """Keep the first of the most telling lines."""
        for rank, pattern in enumerate(TELLING[: self._reason_rank]):
            if pattern.search(line):
                self.reason, self._reason_rank = line.decode(errors="replace").strip(), rank
                return

    def send(self, byte: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._in.write(byte)
            self._in.flush()

    def stop_now(self) -> None:
        """The end of its input: SIGTERM, a short grace, SIGKILL."""
        self.stopped = True
        with contextlib.suppress(OSError):
            self._in.close()

    def kill(self) -> None:
        """The last resort: our own end of it; the node stops by itself, since it hears no more."""
        self.stopped = True
        self._process.kill()

    def poll(self) -> int | None:
        """Its code once it has ended; 128 + N for a signal."""
        if self.code is None and (code := self._process.poll()) is not None:
            self.code = 128 - code if code < 0 else code
            self.lost = self.node.rank > 0 and (code < 0 or code == SSH_LOST)
            self._reader.join(2)  # what it said last; a process that it left may hold the pipe open
            with contextlib.suppress(OSError):
                self._in.close()
            if not self._reader.is_alive():
                with contextlib.suppress(OSError):
                    self._out.close()
        return self.code

    @property
    def how(self) -> str:
        """In words, how it ended."""
        what = "lost its connection" if self.lost else f"ended with code {self.code}"
        return f"{self.node} {what}" + (f": {self.reason}" if self.reason else "")

    def __lt__(self, other: Member) -> bool:
        """By how much its end explains of the others'."""
        return (not self.lost, self._reason_rank) < (not other.lost, other._reason_rank)


class Signals:
    """SIGTERM, Ctrl-C and a terminal that hangs up, counted; twice at once is one."""

    def __init__(self) -> None:
        self.count, self.last, self._at = 0, 0, 0.0

    def __enter__(self) -> Signals:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        # a launcher that sleeps would look dead to its nodes
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.count == 0 or now - self._at > REPEAT_SECONDS:
            self.count, self.last, self._at = self.count + 1, number, now


def start(launch: Launch) -> list[Member]:
    """Every node's part, on all nodes at once."""
    try:
        launch.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"LOG_DIR={launch.log_dir}: {error.strerror}", "name a folder that can be written") from None
    members: list[Member] = []
    try:
        for node in launch.nodes:
            words = command.argv(launch, node, command.supervised(launch, node.rank))
            members.append(Member(node, words, launch.log_dir / f"node-{node.rank}.log"))
    except OSError as error:
        for member in members:
            member.stop_now()
        raise UserError(f"cannot start {error.filename}: {error.strerror}", "bash and ssh are needed here") from None
    return members


class Watch:
    """Until all nodes have ended.  ``failed``: those that ended badly before anybody asked, the most telling first."""

    def __init__(self, members: list[Member], save_grace_s: float, signals: Signals) -> None:
        self.members, self.save_grace_s, self.signals = members, save_grace_s, signals
        self.failed: list[Member] = []
        self.told = 0  # signals acted upon
        self.steps: list[tuple[float, Callable[[], None]]] = []  # what is to be done, when (monotonic seconds)

    def run(self) -> None:
        beat_at = 0.0
        while running := [member for member in self.members if member.poll() is None]:
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + BEAT_S
                for member in running:
                    member.send(b".")
            self.notice_failures()
            self.notice_signals()
            for step in [step for step in self.steps if now >= step[0]]:
                self.steps.remove(step)
                step[1]()
            time.sleep(0.05)
        self.notice_failures()
        self.failed.sort()

    def notice_failures(self) -> None:
        bad = [m for m in self.members if m.code and not m.stopped and m not in self.failed]
        if not bad or self.told:
            return
        if not self.failed:  # the one that began it may not be the first that is seen
            self.at(SETTLE_S, self.stop_the_others)
        self.failed += bad

    def stop_the_others(self) -> None:
        running = [member for member in self.members if member.code is None]
        self.failed.sort()
        tell(self.failed[0].how + ("; stopping the others" if running else ""))
        for member in running:
            member.stop_now()
        self.at(command.STOP_GRACE_S + END_S, self.kill)

    def notice_signals(self) -> None:
        if self.signals.count == self.told or self.failed:
            return
        self.told += 1
        if self.told == 1:
            name = signal.Signals(self.signals.last).name
            tell(f"{name}: the nodes have {self.save_grace_s:.0f} s to save; a second signal: {LAST_GRACE_S} s")
            for member in self.members:
                member.send(b"t")
            self.at(self.save_grace_s, self.kill_there)
        elif self.told == 2:
            tell(f"a second signal: {LAST_GRACE_S} s from now every node is killed")
            self.at(LAST_GRACE_S, self.kill_there)

    def at(self, seconds: float, step: Callable[[], None]) -> None:
        self.steps.append((time.monotonic() + seconds, step))

    def kill_there(self) -> None:
        tell("the time is up: every node is killed")
        for member in self.members:
            member.send(b"k")
        self.at(END_S, self.kill)

    def kill(self) -> None:
        for member in self.members:
            if member.code is None:
                member.kill()
