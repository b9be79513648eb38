"""Looks at every node before anything starts, all at once, and tells every problem in one table."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.errors import UserError
from train_t2i.launch import command, probe
from train_t2i.launch.nodes import Launch, Node

CLOCK_S = 5  # clocks may differ by so much
ANSWER_S = 300  # a node that says nothing for so long

# Bash that enters the environment as the launch will, and hands over to the probe with the best Python there is.
SCRIPT = """
activated=no; cd -- "$1" 2>/dev/null; if [[ -r "$2" ]] && source "$2" ${3:+"$3"} >/dev/null </dev/null; then activated=yes; fi
python="$(command -v python || command -v python3)" || { echo "no python" >&2; exit 3; }
exec "$python" -I -c "$4" "$activated" "$5" </dev/null
"""


@dataclass(frozen=True)
class Answer:
    """What a node found, or why it found nothing; and when the question was put and answered (Unix seconds)."""

    node: Node
    found: Mapping[str, Any] | None
    said: str
    unreachable: bool
    asked_at: float
    answered_at: float


@dataclass(frozen=True)
class Problem:
    node: Node
    check: str
    found: str
    way_out: str


def check(launch: Launch) -> Path | None:
    """Raises UserError, with the table on stderr, unless every node is ready.  The run's marker file, where it is known."""
    with ThreadPoolExecutor(len(launch.nodes)) as pool:
        answers = list(pool.map(lambda node: ask(launch, node), launch.nodes))
    problems = problems_of(launch, answers)
    if problems:
        print(table(problems), file=sys.stderr)
        count = len({problem.node.rank for problem in problems})
        raise UserError(
            f"{len(problems)} problems on {count} of {len(launch.nodes)} nodes; nothing was started",
            "see the last column above",
        )
    return marker_of(launch, answers[0])


def marker_of(launch: Launch, answer: Answer) -> Path | None:
    """The file in which the master's trainer says how it ended."""
    rehearsal = answer.found["rehearsal"] if answer.found else None
    if not rehearsal:
        return None
    return Path(launch.remote_dir) / probe.marker_of(rehearsal["settings"])


# -- asking ----------------------------------------------------------------------------------------------------------


def request(launch: Launch, node: Node) -> dict[str, Any]:
    return {
        "dir": launch.remote_dir,
        "script": launch.train_script,
        "flags": list(launch.flags),
        "variables": command.environment(launch, node.rank),
        "data": data_flag(launch.flags),
        "master": launch.master,
        "port": launch.master_port if node.rank == 0 else None,
    }


def data_flag(flags: Sequence[str]) -> str | None:
    """The value of the last --data-path-train."""
    found = None
    for i, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name.replace("_", "-") == "--data-path-train":
            found = value if equals else flags[i + 1] if i + 1 < len(flags) else None
    return found


def question(launch: Launch, node: Node) -> list[str]:
    asked = json.dumps(request(launch, node))
    words = [launch.remote_dir, command.activate(launch), launch.conda_env, command.source_of("probe.py"), asked]
    return command.argv(launch, node, f"bash -c {shlex.quote(SCRIPT)} preflight {command.quoted(words)}")


def ask(launch: Launch, node: Node) -> Answer:
    asked_at = time.time()
    try:
        done = subprocess.run(
            question(launch, node), stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=ANSWER_S
        )
        code, out, err = done.returncode, done.stdout, done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired:
        code, out, err = 1, b"", f"no answer after {ANSWER_S} s"
    except OSError as error:
        code, out, err = 255, b"", f"{error.filename}: {error.strerror}"
    said = ([line.strip() for line in err.splitlines() if line.strip()] or [f"code {code}"])[-1]
    return Answer(node, answer_of(out), said, code == 255 and node.rank > 0, asked_at, time.time())


def answer_of(out: bytes) -> dict[str, Any] | None:
    """The probe's line among those of a talkative login."""
    marked = [line for line in out.split(b"\n") if line.startswith(probe.MARK.encode())]
    return json.loads(marked[-1].removeprefix(probe.MARK.encode())) if marked else None


# -- judging ---------------------------------------------------------------------------------------------------------


def problems_of(launch: Launch, answers: Sequence[Answer]) -> list[Problem]:
    """Node by node, and each against the first that has something to compare with."""
    problems = [problem for answer in answers for problem in own_problems(launch, answer)]
    for name in ("code", "settings", "data"):
        having = [(answer.node, value) for answer in answers if (value := compared(answer, name)) is not None]
        for node, value in having[1:]:
            problems += difference(name, node, value, having[0][1], having[0][0])
    return sorted(problems, key=lambda problem: problem.node.rank)


def compared(answer: Answer, name: str) -> dict[str, Any] | None:
    if answer.found is None:
        return None
    return (answer.found["rehearsal"] or {}).get("settings") if name == "settings" else answer.found[name]


def difference(name: str, node: Node, here: Mapping[str, Any], there: Mapping[str, Any], other: Node) -> list[Problem]:
    keys = [key for key in [*there, *(k for k in here if k not in there)] if here.get(key) != there.get(key)]
    if not keys:
        return []
    if name == "code":
        more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
        shown = f"{', '.join(sorted(keys)[:2])}{more} differ from {other}"
        return [Problem(node, "same code", shown, "bring the checkouts to the same commit")]
    if name == "data":
        shown = f"{here['bytes']} bytes, digest {here['digest']}; {other}: {there['bytes']}, {there['digest']}"
        return [Problem(node, "same data", shown, "copy the data from one node to the other")]
    shown = "; ".join(f"{key} {here.get(key)!r}, on {other} {there.get(key)!r}" for key in keys[:3])
    return [Problem(node, "same settings", shown, "give it as a flag: a variable stays on its machine")]


def own_problems(launch: Launch, answer: Answer) -> list[Problem]:
    """What is wrong with a node by itself."""
    node, found = answer.node, answer.found
    if found is None:
        if answer.unreachable:
            return [
                Problem(node, "reachable", answer.said, f"try ssh {node.host}; see --user, --ssh-port, --ssh-options")
            ]
        return [Problem(node, "answers", answer.said, "bash and python3 are needed there")]
    wrong: list[tuple[str, str, str]] = []
    if not found["folder"]:
        wrong.append(("folder", f"{launch.remote_dir} is not there", "put the checkout there, or set REMOTE_DIR"))
    elif not found["script"]:
        wrong.append(("script", f"{launch.train_script} is not in {launch.remote_dir}", "set TRAIN_SCRIPT"))
    if not found["activated"]:
        wrong.append(("environment", f"{launch.source_dir} {launch.conda_env}: cannot be activated", "set SOURCE_DIR"))
    elif found["missing"] or found["python"] < [3, 11]:
        has = ".".join(map(str, found["python"]))
        lacks = f"Python {has}" + (f", without {', '.join(found['missing'])}" if found["missing"] else "")
        wrong.append(("packages", lacks, "install environment.yml or uv.lock there; Python is 3.11 or newer"))
    cpu = launch.travels.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    if not cpu and found["gpus"] < launch.num_processes:
        wrong.append(("GPUs", f"{found['gpus']}, needs {launch.num_processes}", "set NUM_PROCESSES"))
    if found["port"]:
        wrong.append(("master port", f"{launch.master_port}: {found['port']}", "set MASTER_PORT to one that is free"))
    if found["address"]:
        wrong.append(("master address", f"{launch.master}: {found['address']}", "name one that is known there"))
    if not answer.asked_at - CLOCK_S <= found["clock"] <= answer.answered_at + CLOCK_S:
        off = found["clock"] - answer.answered_at
        wrong.append(("clock", f"{off:+.0f} s from the master's", "let NTP set it: logs and file times would mislead"))
    wrong += data_problems(launch, found)
    return [Problem(node, *line) for line in wrong]


def data_problems(launch: Launch, found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rehearsal = found["rehearsal"]
    if rehearsal and rehearsal["said"]:
        return [("settings", rehearsal["said"], f"see bash {launch.train_script} --dry-run there")]
    if not found["script"] or found["data"] or not found["data_path"]:
        return []
    if launch.travels.get("TINY") == "1" and data_flag(launch.flags) is None:
        return []  # the launcher makes it
    return [("data", f"{found['data_path']} is not there", "fetch or copy it, or give --data-path-train")]


def table(problems: Sequence[Problem]) -> str:
    rows = [("node", "check", "found", "way out"), *((str(p.node), p.check, p.found, p.way_out) for p in problems)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:{widths[i]}}" for i in range(3)), row[3]]).rstrip() for row in rows)
