"""Two machines for a test: two sshd on loopback addresses, own keys, pinned host keys; ended by their own pid."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS = ("127.0.0.2", "127.0.0.3")
SSHD = "/usr/sbin/sshd"


@dataclass
class Servers:
    """What a launch needs to reach them."""

    config: Path

    @property
    def options(self) -> str:
        return f"-F {self.config}"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as server:
        server.bind((host, 0))
        return server.getsockname()[1]


def installed(program: str, *packages: str) -> None:
    """Debian's packages, where they are missing and may be installed; else the test is skipped with the reason."""
    if reason := refused(program, *packages):
        pytest.skip(reason)


@functools.cache  # a mirror that does not answer is asked once
def refused(program: str, *packages: str) -> str:
    if Path(program).exists():
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"{program} is missing, and only root can install it with apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: starts no service
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(
                ["apt-get", *words], env=environment, capture_output=True, text=True, timeout=240, check=False
            )
        except subprocess.TimeoutExpired:
            return f"apt-get {words[0]}: no answer in 240 s"
        if done.returncode:
            return f"apt-get {words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
    return ""


def key(folder: Path, name: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)


@contextlib.contextmanager
def serve(folder: Path, host: str, port: int, before: Sequence[str] = ()) -> Iterator[Path]:
    """An sshd on HOST:PORT for the key `client` of the folder; the client's config for it.  ``before``: words of a wrapper."""
    installed(SSHD, "openssh-server", "openssh-client")
    Path("/run/sshd").mkdir(exist_ok=True)
    key(folder, host)
    (folder / f"known-{host}").write_text(f"[{host}]:{port} {(folder / f'{host}.pub').read_text()}")
    client = folder / f"client-{host}"
    client.write_text(
        f"Host {host}\n  Port {port}\n  IdentityFile {folder}/client\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known-{host}\n  StrictHostKeyChecking yes\n"
    )
    config = folder / f"sshd-{host}"
    config.write_text(
        f"ListenAddress {host}\nPort {port}\nHostKey {folder}/{host}\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/client.pub\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "PidFile none\nLogLevel VERBOSE\n"
    )
    with (folder / f"sshd-{host}.log").open("wb") as log:
        process = subprocess.Popen([*before, SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    try:
        wait_for_port(host, port)
        yield client
    finally:
        for session in sessions(process.pid):  # one whose network is cut would wait for hours
            with contextlib.suppress(ProcessLookupError):
                os.kill(session, signal.SIGTERM)
        process.terminate()
        process.wait(timeout=10)


def sessions(server: int) -> list[int]:
    """The processes of an sshd that serve a connection."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == server:
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """One sshd a host, on a port that is free, for this user alone."""
    key(folder, "client")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(serve(folder, host, free_port(host))) for host in HOSTS]
        (folder / "config").write_text("".join(client.read_text() for client in clients))
        yield Servers(folder / "config")


def wait_for_port(host: str, port: int) -> None:
    end = time.monotonic() + 20
    while True:
        with socket.socket() as client:
            if client.connect_ex((host, port)) == 0:
                return
        assert time.monotonic() < end, f"sshd does not answer on {host}:{port}"
        time.sleep(0.05)
