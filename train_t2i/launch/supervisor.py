"""Runs on each node, sent there as source: starts the node's command and ends all of it when the master says so or is gone.

    python -I -c SOURCE SAVE_GRACE_S STOP_GRACE_S SILENCE_S COMMAND...

Standard input comes from the master.  ``.``: it is alive.  ``t``: SIGTERM, and SAVE_GRACE_S to save.  ``k``: SIGKILL.
The end of the input, or SILENCE_S without a byte: the master or the connection is gone; SIGTERM, and STOP_GRACE_S.
Nothing is left of the command afterwards, processes in sessions of their own included.  Linux.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import IO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Every living process below this one.  As a subreaper it inherits those whose parents died."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def send_all(number: int) -> None:
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def forward(pipe: IO[bytes] | None) -> None:
    """What the command says.  Once nobody listens it is dropped: a broken pipe would end the command while it saves."""
    assert pipe is not None
    for block in iter(lambda: os.read(pipe.fileno(), 65536), b""):
        with contextlib.suppress(OSError):
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(1, rest) :]


class Supervisor:
    def __init__(self, save_grace_s: float, stop_grace_s: float, silence_s: float) -> None:
        self.save_grace_s, self.stop_grace_s, self.silence_s = save_grace_s, stop_grace_s, silence_s
        self.kill_at: float | None = None  # monotonic seconds; none: nobody asked for an end
        self.listening, self.heard_at = True, time.monotonic()

    def run(self, command: list[str]) -> int:
        """Start and supervise; the exit code, 128 + N for a signal.  255 is ssh's own: it becomes 1."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.end(self.save_grace_s))
        said = threading.Thread(target=forward, args=[self.child.stdout], daemon=True)
        said.start()
        while self.child.poll() is None:
            self.listen()
            now = time.monotonic()
            if self.listening and now - self.heard_at > self.silence_s:
                self.listening = False
                self.end(self.stop_grace_s)
            if self.kill_at is not None and now >= self.kill_at:
                send_all(signal.SIGKILL)
        self.sweep(asked=self.child.returncode != 0)
        said.join(self.stop_grace_s)
        code = self.child.returncode
        return 128 - code if code < 0 else 1 if code == 255 else code

    def listen(self) -> None:
        """Wait a moment for what the master says."""
        if not self.listening:
            time.sleep(0.1)
        elif select.select([0], [], [], 0.1)[0]:
            self.heard_at = time.monotonic()
            said = os.read(0, 4096)
            if not said:
                self.listening = False
                self.end(self.stop_grace_s)
            if b"t" in said:
                self.end(self.save_grace_s)
            if b"k" in said:
                self.kill_at = 0

    def end(self, grace_s: float) -> None:
        """SIGTERM once to the command's group; torch's launcher passes it on to sessions of its own."""
        if self.kill_at is None:
            self.kill_at = time.monotonic() + grace_s
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGTERM)

    def sweep(self, asked: bool) -> None:
        """End what the command left behind."""
        end = time.monotonic() + self.stop_grace_s
        if asked:
            send_all(signal.SIGTERM)
        while descendants():
            if time.monotonic() > end:
                send_all(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(Supervisor(*map(float, sys.argv[1:4])).run(sys.argv[4:]))
