"""What to start where: settings from flags, then the environment, then a small file; each of them checked."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from train_t2i import redact
from train_t2i.errors import UserError

HERE = Path(__file__).resolve().parents[1]  # train_t2i

# variable -> (default, help); the flag is the same word, `--master-addr`
SETTINGS = {
    "MASTER_ADDR": ("", "this machine's address, as the workers reach it"),
    "MASTER_PORT": ("29500", "port on which the processes meet; free on the master, open to the workers"),
    "WORKER_NODES": ("", "the other machines, separated by spaces; HOST or USER@HOST"),
    "TRAIN_SCRIPT": ("scripts/multi_node/dmdr_sdxl_refl.sh", "what each node runs, from REMOTE_DIR"),
    "REMOTE_DIR": (str(HERE / "sdxl"), "folder in which each node runs it"),
    "SOURCE_DIR": ("/conda/bin/activate", "the environment's activate, conda's or .venv/bin/activate"),
    "CONDA_ENV": ("dmdr", "the environment's name, for conda"),
    "NUM_PROCESSES": ("8", "processes (GPUs) a node"),
    "BACKEND": ("", "how the processes share the work; the launchers' BACKEND"),
    "SSH_USER": ("", "user on the workers"),
    "SSH_PORT": ("", "port of their sshd"),
    "SSH_OPTIONS": ("", "more options of ssh, as words: '-i KEY -F FILE'"),
    "LOG_DIR": ("", "folder of the nodes' logs (default: runs/launch/TIME)"),
    "SAVE_GRACE": ("600", "seconds that nodes have to save after Ctrl-C or SIGTERM"),
}
OTHER_SPELLINGS = {"SSH_USER": ["--user"]}
TRAVELS = re.compile(r"(NCCL|GLOO|OMP)_[A-Za-z0-9_]+|WANDB_MODE|BACKEND|TINY|HF_HUB_OFFLINE|ACCELERATE_USE_CPU")
HOST = re.compile(r"(?:([A-Za-z_][A-Za-z0-9._-]*)@)?([A-Za-z0-9][A-Za-z0-9._:-]*)")


@dataclass(frozen=True)
class Node:
    """A machine; rank 0 is this one, the master."""

    rank: int
    host: str
    user: str = ""

    def __str__(self) -> str:
        return f"node {self.rank} ({self.host})"


@dataclass(frozen=True)
class Launch:
    """All that decides what runs where.  ``travels``: variables that every node gets; ``flags``: of train."""

    nodes: tuple[Node, ...]
    master_port: int
    train_script: str
    remote_dir: str
    source_dir: str
    conda_env: str
    num_processes: int
    ssh_port: str
    ssh_options: tuple[str, ...]
    log_dir: Path
    save_grace_s: float
    travels: dict[str, str]
    flags: tuple[str, ...]
    dry_run: bool = False

    @property
    def master(self) -> str:
        return self.nodes[0].host


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, "see multi.sh --help")


def parser() -> Parser:
    made = Parser(
        prog="python -m train_t2i launch",
        description="Starts one training script on several machines: here, and on the workers over SSH.  A setting comes "
        "from its flag, else from the environment (MASTER_ADDR=...), else from --env-file.  Other flags go to train.",
        allow_abbrev=False,
    )
    made.add_argument("--env-file", help="file of KEY=VALUE lines; read, never run")
    made.add_argument("--dry-run", action="store_true", help="print what each node would run; connects to nothing")
    for name, (default, text) in SETTINGS.items():
        flags = [*OTHER_SPELLINGS.get(name, []), "--" + name.lower().replace("_", "-")]
        shown = f" (default: {default})" if default else ""
        made.add_argument(*flags, dest=name, metavar=name, help=text + shown)
    return made


def spelled(argument: str, own: Sequence[str]) -> str:
    """``_`` and ``-`` are equal in our own flags; a flag of train stays as it is."""
    name, equals, value = argument.partition("=")
    dashed = name.replace("_", "-")
    return dashed + equals + value if dashed in own else argument


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """Flags > environment > env file > defaults, checked.  Raises UserError."""
    made = parser()
    own = list(made._option_string_actions)
    given = list(arguments)
    for argument in given:
        if "\0" in argument:
            raise UserError("a flag holds a NUL byte", "no program can be given one")
    known, flags = made.parse_known_args([spelled(argument, own) for argument in given])
    file = read_env_file(known.env_file) if known.env_file else {}
    values: dict[str, str] = {}
    for name, (default, _) in SETTINGS.items():
        of_flag = getattr(known, name)
        values[name] = of_flag if of_flag is not None else environment.get(name) or file.get(name) or default
    travels = {n: v for n, v in {**file, **environment}.items() if may_travel(n)}
    if values["BACKEND"]:
        travels["BACKEND"] = values["BACKEND"]
    refuse_secrets(travels, flags)
    return checked(values, dict(sorted(travels.items())), tuple(flags), known.dry_run)


def may_travel(variable: str) -> bool:
    """Whether a variable goes to every node, which shows it in command lines and logs."""
    return TRAVELS.fullmatch(variable) is not None and not redact.named(variable)


def refuse_secrets(travels: Mapping[str, str], flags: Sequence[str]) -> None:
    """Raises UserError: all of it stands in the command lines of every node, and ``--dry-run`` prints it."""
    shown = [*travels.items(), *zip(("", *flags), flags)]
    for name, value in shown:
        if kind := redact.secret_in(value):
            told = value.partition("=")[0] if value.startswith("-") else name
            raise UserError(
                f"{told}: holds {kind}, and what goes to every node stands in its command lines and logs",
                "leave it out, and set it in each machine's own environment",
            )


def read_env_file(path: str) -> dict[str, str]:
    """``KEY=VALUE`` lines; ``#`` begins a comment line, quotes around a value are dropped, nothing is expanded."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--env-file {path}: cannot be read ({error})") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not name or name.startswith("#"):
            continue
        known = name in SETTINGS or may_travel(name)
        if not equals or not known:
            raise UserError(
                f"--env-file {path}, line {number}: {name.split()[0]} is no setting of a launch",
                f"KEY=VALUE lines with {', '.join(SETTINGS)}, NCCL_*, GLOO_*, OMP_*, WANDB_MODE, TINY, HF_HUB_OFFLINE",
            )
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        found[name] = value[1:-1] if quoted else value.strip()
    return found


def checked(values: Mapping[str, str], travels: dict[str, str], flags: tuple[str, ...], dry_run: bool) -> Launch:
    for name, hint in (
        ("MASTER_ADDR", "set it to this machine's address, as the workers reach it"),
        ("WORKER_NODES", "list the other machines' addresses, separated by spaces"),
    ):
        if not values[name].strip():
            raise UserError(f"{name} is not set", hint)
    nodes = nodes_of(values["MASTER_ADDR"].strip(), values["WORKER_NODES"].split(), values["SSH_USER"])
    for name in ("TRAIN_SCRIPT", "REMOTE_DIR", "SOURCE_DIR"):
        if "\0" in values[name] or not values[name]:
            raise UserError(f"{name}={values[name]!r}: not a path")
    if not Path(values["REMOTE_DIR"], values["TRAIN_SCRIPT"]).exists():
        raise UserError(
            f"TRAIN_SCRIPT={values['TRAIN_SCRIPT']}: not in {values['REMOTE_DIR']}", "give it relative to REMOTE_DIR"
        )
    port = number("MASTER_PORT", values["MASTER_PORT"], 65535)
    if values["SSH_PORT"]:
        number("SSH_PORT", values["SSH_PORT"], 65535)
    try:
        ssh_options = tuple(shlex.split(values["SSH_OPTIONS"]))
    except ValueError as error:
        raise UserError(f"SSH_OPTIONS={values['SSH_OPTIONS']}: {error}", "write them as words of a command") from None
    log_dir = values["LOG_DIR"] or f"runs/launch/{time.strftime('%Y%m%d-%H%M%S')}"
    return Launch(
        nodes=nodes, master_port=port, train_script=values["TRAIN_SCRIPT"], remote_dir=values["REMOTE_DIR"],
        source_dir=values["SOURCE_DIR"], conda_env=values["CONDA_ENV"],
        num_processes=number("NUM_PROCESSES", values["NUM_PROCESSES"]), ssh_port=values["SSH_PORT"],
        ssh_options=ssh_options, log_dir=Path(log_dir), save_grace_s=number("SAVE_GRACE", values["SAVE_GRACE"]),
        travels=travels, flags=flags, dry_run=dry_run,
    )  # fmt: skip


def nodes_of(master: str, workers: Sequence[str], user: str) -> tuple[Node, ...]:
    """Rank 0 is the master; the user before a worker's @ wins over SSH_USER."""
    if user and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9._-]*", user):
        raise UserError(f"SSH_USER={user}: not a user's name")
    nodes = []
    for rank, text in enumerate([master, *workers]):
        match = HOST.fullmatch(text)
        if match is None or (rank == 0 and match[1]):
            where = "WORKER_NODES" if rank else "MASTER_ADDR"
            raise UserError(f"{text}: not a host name or an address", f"see {where}")
        nodes.append(Node(rank, match[2], match[1] or user))
    seen: dict[str, int] = {}
    for node in nodes:
        if node.host in seen:
            raise UserError(f"{node.host} is both node {seen[node.host]} and node {node.rank}", "name a machine once")
        seen[node.host] = node.rank
    return tuple(nodes)


def number(name: str, text: str, most: int = 10**6) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text) or int(text) > most:
        raise UserError(f"{name}={text}: not a whole number from 1 to {most}")
    return int(text)
