"""A Slurm cluster of two nodes on this machine: munged, slurmctld, and a slurmd for each name in a UTS namespace of its own.

Debian's Slurm is built without several slurmd a host; a namespace gives the second one a host name of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_nodes import until
from sshd import free_port, installed

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/%n.pid
SlurmctldPidFile={root}/controller.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2
NodeName={host}b NodeAddr=127.0.0.2 Port={ports[1]} CPUs=2
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass
class Cluster:
    config: Path

    def call(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """What a Slurm program says; it has to succeed."""
        clean = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PATH")}
        done = subprocess.run(
            words, cwd=cwd, env=clean | {"SLURM_CONF": str(self.config)} | variables, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, cwd: Path, script: Path, options: list[str], *flags: str, **variables: str) -> str:
        """A job's number."""
        words = [
            "sbatch",
            "--parsable",
            "--nodes",
            "2",
            "--output",
            str(cwd / "job-%j.log"),
            *options,
            str(script),
            *flags,
        ]
        return self.call(*words, cwd=cwd, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        until(lambda: self.job(number)["JobState"] in states, seconds)
        return self.job(number)


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Skips the test, with the reason, where the daemons cannot be installed or do not start."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster for a test needs root")
    installed("/usr/sbin/slurmctld", "slurmctld", "slurmd", "slurm-client", "munge")
    host = socket.gethostname()
    ports = [free_port(), free_port()]
    (root / "state").mkdir()
    config = root / "slurm.conf"
    config.write_text(CONFIG.format(root=root, host=host, controller_port=free_port(), ports=ports))
    (root / "munge.key").write_bytes(os.urandom(64))
    (root / "munge.key").chmod(0o600)
    munged = ["munged", "--foreground", "--force", f"--key-file={root}/munge.key", f"--socket={root}/munge.socket"]
    munged += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
    commands = [munged, ["slurmctld", "-D", "-f", str(config)]]
    for name in (host, f"{host}b"):
        (root / f"spool-{name}").mkdir()
        started = 'hostname "$1"; exec slurmd -D -N "$1" -f "$2"'
        commands.append(["unshare", "--uts", "bash", "-c", started, "slurmd", name, str(config)])
    with contextlib.ExitStack() as stack:
        for i, command in enumerate(commands):
            log = stack.enter_context((root / f"daemon-{i}.log").open("wb"))
            stack.callback(
                end, subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"SLURM_CONF": str(config)})
            )
            if i < 2:
                time.sleep(1)  # each needs the one before
        made = Cluster(config)
        stack.callback(made.call, "scancel", "--user", "root")
        idle = ("sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%t")
        try:
            until(lambda: made.call(*idle).split() == ["idle", "idle"], 30)
        except AssertionError:
            logs = "".join((root / f"daemon-{i}.log").read_text()[-500:] for i in range(len(commands)))
            pytest.skip(f"the Slurm daemons do not come up: {logs}")
        yield made


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
