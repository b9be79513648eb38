"""What a node is asked to run: one string of bash with every value quoted, and how it gets there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from train_t2i.errors import UserError
from train_t2i.launch.nodes import Launch, Node

MOST_BYTES = 120_000  # Linux: 128 KiB a word of a command
HERE = Path(__file__).parent

# A second signal of ours or a lost connection has to end a node within 30 s, with the time it takes to be noticed
STOP_GRACE_S = 8  # SIGTERM -> SIGKILL
SILENCE_S = 20  # a node that hears nothing from the master for so long stops
# The first value that ssh is given for an option holds: SSH_OPTIONS wins over all but BatchMode
SSH_FIRST = ("-T", "-o", "BatchMode=yes")
SSH_LAST = ("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


def quoted(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def activate(launch: Launch) -> str:
    """The activate script; bash would look for a bare name in PATH."""
    return launch.source_dir if launch.source_dir.startswith("/") else f"./{launch.source_dir}"


def enter(launch: Launch) -> str:
    """Bash that goes to the folder and activates the environment; a .venv's activate ignores the name that conda's needs."""
    source = [activate(launch), *filter(None, [launch.conda_env])]
    return f"cd -- {shlex.quote(launch.remote_dir)} && source {quoted(source)}"


def environment(launch: Launch, rank: int) -> dict[str, str]:
    """The variables that a node gets."""
    return {
        **launch.travels,
        "MASTER_ADDR": launch.master,
        "MASTER_PORT": str(launch.master_port),
        "NUM_MACHINES": str(len(launch.nodes)),
        "MACHINE_RANK": str(rank),
        "NUM_PROCESSES": str(launch.num_processes),
    }


def training(launch: Launch, rank: int) -> list[str]:
    variables = [f"{name}={value}" for name, value in environment(launch, rank).items()]
    return ["env", *variables, "bash", "--", launch.train_script, *launch.flags]


def node_command(launch: Launch, rank: int) -> str:
    """What a node runs, for people: ``--dry-run`` prints it, and it may be pasted into bash there."""
    return f"{enter(launch)} && exec {quoted(training(launch, rank))}"


def supervised(launch: Launch, rank: int) -> str:
    """The same under our supervisor, whose source travels along: it ends with the connection, and leaves no orphan."""
    times = [str(launch.save_grace_s), str(STOP_GRACE_S), str(SILENCE_S)]
    supervisor = ["python", "-I", "-c", source_of("supervisor.py"), *times]
    return f"{enter(launch)} </dev/null && exec {quoted([*supervisor, *training(launch, rank)])}"


def source_of(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def argv(launch: Launch, node: Node, command: str) -> list[str]:
    """The program and arguments that run a string of bash on a node: bash here, ssh for a worker.

    A worker's login shell may be any POSIX shell: it sees ``exec bash -c`` and one quoted word.
    """
    remote = f"exec bash -c {shlex.quote(command)}"
    if len(os.fsencode(remote)) > MOST_BYTES:
        raise UserError("the flags and variables are too long for a command line", "put flags into --config FILE.yaml")
    if node.rank == 0:
        return ["bash", "-c", command]
    where = [*(["-p", launch.ssh_port] if launch.ssh_port else []), *(["-l", node.user] if node.user else [])]
    return ["ssh", *SSH_FIRST, *launch.ssh_options, *SSH_LAST, *where, "--", node.host, remote]
