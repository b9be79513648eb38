"""Two machines for a test: two sshd on loopback addresses, own keys, pinned host keys; ended by their own pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS = ("127.0.0.1", "127.0.0.2")  # the master reaches the second only; the first serves a third node
SSHD = "/usr/sbin/sshd"


@dataclass
class Servers:
    """What a launch needs to reach them."""

    config: Path
    ports: dict[str, int]

    @property
    def options(self) -> str:
        return f"-F {self.config}"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as server:
        server.bind((host, 0))
        return server.getsockname()[1]


def installed(program: str, *packages: str) -> None:
    """Debian's packages, where they are missing and may be installed; else the test is skipped with the reason."""
    if Path(program).exists():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{program} is missing, and only root can install it with apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: starts no service
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", *words], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            pytest.skip(f"apt-get {words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """One sshd a host, on a port that is free, for this user alone."""
    installed(SSHD, "openssh-server", "openssh-client")
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("client", *HOSTS):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(words, check=True)
    ports = {host: free_port(host) for host in HOSTS}
    known = [f"[{host}]:{ports[host]} {(folder / f'{host}.pub').read_text()}" for host in HOSTS]
    (folder / "known_hosts").write_text("".join(known))
    lines = [f"Host {host}\n  Port {ports[host]}\n" for host in HOSTS]
    (folder / "config").write_text(
        "".join(lines) + f"Host *\n  IdentityFile {folder}/client\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    processes = []
    try:
        for host in HOSTS:
            config = folder / f"sshd-{host}"
            config.write_text(
                f"ListenAddress {host}\nPort {ports[host]}\nHostKey {folder}/{host}\nUsePAM no\nStrictModes no\n"
                f"AuthorizedKeysFile {folder}/client.pub\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
                "PidFile none\nLogLevel VERBOSE\n"
            )
            with (folder / f"sshd-{host}.log").open("wb") as log:
                processes.append(subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log))
        for host in HOSTS:
            wait_for_port(host, ports[host])
        yield Servers(folder / "config", ports)
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=10)


def wait_for_port(host: str, port: int) -> None:
    end = time.monotonic() + 20
    while True:
        with socket.socket() as client:
            if client.connect_ex((host, port)) == 0:
                return
        assert time.monotonic() < end, f"sshd does not answer on {host}:{port}"
        time.sleep(0.05)
