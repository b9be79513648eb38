"""Launches without sshd: an `ssh` that runs its one command here, in a login shell of the test's choice.

A host may live in another folder than the master: the fake ssh puts it in the place of the master's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sshd import free_port

ROOT = Path(__file__).resolve().parents[2]
MULTI = ROOT / "scripts" / "multi_node" / "multi.sh"
FAKE_SSH = f"""#!{sys.executable}
import os, sys
host, command = sys.argv[-2:]
assert sys.argv[-3] == "--", sys.argv
if host == "unreachable":
    print("ssh: connect to host unreachable port 22: No route to host", file=sys.stderr)
    sys.exit(255)
if host == "hung" and "supervisor" in command.lower():  # answers the pre-flight, and then never again
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
other = os.environ.get("FAKE_FOLDER_OF_" + host)
if other:
    command = command.replace(os.environ["FAKE_MASTER_FOLDER"], other)
shell = os.environ.get("FAKE_SHELL", "sh")
os.execvp(shell, [shell, "-c", command])
"""


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Does it run?  A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass
class Fake:
    """A folder with a fake ssh, an activate script and a training script."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / "bin").mkdir()
        self.folder = self.root / "node"
        self.folder.mkdir()
        ssh = self.root / "bin" / "ssh"
        ssh.write_text(FAKE_SSH)
        ssh.chmod(0o755)
        (self.root / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
        self.variables |= {
            "MASTER_ADDR": "localhost", "WORKER_NODES": "worker", "TRAIN_SCRIPT": "run.sh", "REMOTE_DIR": str(self.folder),
            "SOURCE_DIR": str(self.root / "activate"), "MASTER_PORT": str(free_port()), "NUM_PROCESSES": "1",
            "ACCELERATE_USE_CPU": "true", "LOG_DIR": str(self.root / "logs"), "FAKE_MASTER_FOLDER": str(self.folder),
        }  # fmt: skip

    def script(self, text: str) -> None:
        """What each node runs; its files go to the node's folder, named with $MACHINE_RANK."""
        (self.folder / "run.sh").write_text(text)

    def start(self, *flags: str, **variables: str) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG")}
        clean |= {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix} | self.variables
        with (self.root / "out").open("w") as out, (self.root / "err").open("w") as err:
            return subprocess.Popen(
                ["bash", str(MULTI), *flags], cwd=self.root, env=clean | variables, stdout=out, stderr=err,
                stdin=subprocess.DEVNULL, text=True, start_new_session=True,
            )  # fmt: skip

    def run(self, *flags: str, **variables: str) -> int:
        return ended(self.start(*flags, **variables))

    @property
    def out(self) -> str:
        return (self.root / "out").read_text()

    @property
    def err(self) -> str:
        return (self.root / "err").read_text()

    def pids(self, names: Sequence[str]) -> list[int]:
        """Process ids that the nodes wrote into files, once they are all there."""
        files = [self.folder / name for name in names]
        until(lambda: all(file.exists() and file.read_text().strip() for file in files))
        return [int(file.read_text()) for file in files]


def ended(process: subprocess.Popen[str], seconds: float = 60) -> int:
    try:
        return process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
