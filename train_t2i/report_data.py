"""What a report shows of a run, read from its folder: settings, logged numbers, sample sheets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.errors import UserError

LOGS = {
    "gen": "loss_gen_log.jsonl",
    "gui": "loss_gui_log.jsonl",
    "mon": "monitor_log.jsonl",
}  # prefix of a series -> its file
STEP_FOLDER = re.compile(r"step (\d+)")
Points = tuple[list[float], list[float]]  # steps, values


@dataclass(frozen=True)
class Sheet:
    """The sample images of one step."""

    step: int
    grid: Path
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class RunStory:
    """One run as a report tells it."""

    name: str
    root: Path
    settings: dict[str, Any]
    series: dict[str, Points]  # "gen/loss" -> points; nulls left out
    sheets: tuple[Sheet, ...]  # by step
    first_step: int
    last_step: int
    samples_seen: int
    seconds: float  # in ticks, all together
    peak_memory_gib: float  # of the main process; 0 where an older log does not say
    unreadable: int  # lines of the logs


def read_run(path: str) -> RunStory:
    """Everything of one run.  Raises UserError for a folder that is no run."""
    root = Path(path)
    if not (root / "args.json").is_file():
        raise UserError(f"{path}: not a run folder (no args.json)", "give OUTPUT_DIR/EXP_NAME")
    try:
        settings = json.loads((root / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{root / 'args.json'}: cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{root / 'args.json'}: not a mapping of settings")
    lines, unreadable = {}, 0
    for prefix, name in LOGS.items():
        lines[prefix], bad = read_lines(root / "loss_logs" / name)
        unreadable += bad
    counted = [line for prefix in ("gen", "gui") for line in lines[prefix]]
    steps = [int(line["step"]) for line in lines["gen"]] or [0]
    return RunStory(
        name=root.resolve().name,
        root=root,
        settings=settings,
        series=series_of(lines),
        sheets=read_sheets(root / "samples"),
        first_step=min(steps),
        last_step=max(steps),
        samples_seen=max((int(line.get("samples_seen", 0)) for line in counted), default=0),
        seconds=sum({line["tick"]: float(line.get("seconds_tick") or 0) for line in counted}.values()),
        peak_memory_gib=max((float(line.get("peak_memory_gib") or 0) for line in counted), default=0.0),
        unreadable=unreadable,
    )


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(lines of a log that are whole, how many are not): a run that is still going may be writing the last."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    good, bad = [], 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            good.append(record | {"tick": int(record["tick"]), "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            bad += 1
    return good, bad


def series_of(lines: dict[str, list[dict[str, Any]]]) -> dict[str, Points]:
    """Every logged number as points; x is the generator's step, guidance updates spread over the step they belong to."""
    series: dict[str, Points] = {}
    for prefix, records in lines.items():
        places = spread([record["step"] for record in records])
        for place, record in zip(places, records, strict=True):
            for key, value in record.items():
                if key in ("tick", "step", "samples_seen") or not isinstance(value, int | float):
                    continue
                if math.isfinite(value):
                    steps, values = series.setdefault(f"{prefix}/{key}", ([], []))
                    steps.append(place)
                    values.append(float(value))
    return series


def spread(steps: Sequence[int]) -> list[float]:
    """[0, 0, 1, 1] -> [0, 0.5, 1, 1.5]: several lines of one step follow each other within it."""
    counts: dict[int, int] = {}
    for step in steps:
        counts[step] = counts.get(step, 0) + 1
    seen: dict[int, int] = {}
    places = []
    for step in steps:
        places.append(step + seen.get(step, 0) / counts[step])
        seen[step] = seen.get(step, 0) + 1
    return places


def read_sheets(folder: Path) -> tuple[Sheet, ...]:
    sheets = []
    for path in folder.glob("step *"):
        match = STEP_FOLDER.fullmatch(path.name)
        if match and (path / "grid.png").is_file():
            prompts = path / "prompts.txt"
            text = prompts.read_text(encoding="utf-8", errors="replace") if prompts.is_file() else ""
            told = text.removesuffix("\n").split("\n") if text else []  # a prompt may hold Unicode's own line ends
            sheets.append(Sheet(int(match[1]), path / "grid.png", tuple(told)))
    return tuple(sorted(sheets, key=lambda sheet: sheet.step))


def draws_teacher(settings: Mapping[str, Any]) -> bool:
    """Whether the last row of a run's sheets is the teacher's."""
    from train_t2i.methods import METHODS

    return "teacher" in getattr(METHODS.get(str(settings.get("method"))), "uses", ())


def offsets(runs: Sequence[RunStory]) -> list[int]:
    """What to add to each run's steps so that the stages follow each other; a stage may count on from another run's."""
    begins: list[int] = []
    end = 0
    for run in runs:
        begins.append(end - max(0, run.first_step - 1) if begins else 0)
        end = begins[-1] + run.last_step
    return begins


def thin(sheets: Sequence[Sheet], limit: int) -> list[Sheet]:
    """At most ``limit`` of them, the first and the last included."""
    if len(sheets) <= limit:
        return list(sheets)
    if limit == 1:
        return [sheets[-1]]
    return [sheets[round(i * (len(sheets) - 1) / (limit - 1))] for i in range(limit)]
