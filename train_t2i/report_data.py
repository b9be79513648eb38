"""What a report shows of a run, read from its folder: settings, logged numbers, sample sheets."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from train_t2i.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

LOGS = {
    "gen": "loss_gen_log.jsonl",
    "gui": "loss_gui_log.jsonl",
    "mon": "monitor_log.jsonl",
}  # prefix of a series -> its file
GUARD = re.compile(r"\S+ (?:warning: )?reward guard: step (\d+): (.*)")  # a line of log.txt
STEP_FOLDER = re.compile(r"step (\d+)")
T = TypeVar("T")
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
    starts: tuple[dict[str, Any], ...] = ()  # what each start ran on: see environment.py; older runs have none
    device_seconds: float | None = None  # seconds x processes; None where no start says how many there were
    seconds_step: float | None = None  # median
    guard: tuple[tuple[int, str], ...] = ()  # (step, what the reward guard said)


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
    starts, bad = read_json_lines(root / "environment.jsonl", ("tick", "num_processes"))
    unreadable += bad
    counted = [line for prefix in ("gen", "gui") for line in lines[prefix]]
    ticks = {line["tick"]: float(line.get("seconds_tick") or 0) for line in counted}
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
        seconds=sum(ticks.values()),
        peak_memory_gib=max((float(line.get("peak_memory_gib") or 0) for line in counted), default=0.0),
        unreadable=unreadable,
        starts=tuple(starts),
        device_seconds=device_seconds(ticks, starts),
        seconds_step=seconds_a_step(lines["gen"], ticks),
        guard=read_guard(root / "log.txt"),
    )


def device_seconds(ticks: Mapping[int, float], starts: Sequence[Mapping[str, int]]) -> float | None:
    """Each tick's seconds times the processes of the start that it belongs to: the last one that went on before it."""
    if not starts:
        return None
    ordered = list(starts)
    total = 0.0
    for tick, seconds in ticks.items():
        before = [start for start in ordered if start["tick"] < tick] or ordered[:1]
        total += seconds * before[-1]["num_processes"]
    return total


def seconds_a_step(generator: Sequence[Mapping[str, Any]], ticks: Mapping[int, float]) -> float | None:
    """Median seconds from one generator update to the next, all ticks between them; None of a single step."""
    ends = [line["tick"] for line in generator]
    spent = [
        sum(ticks.get(tick, 0.0) for tick in range(first + 1, last + 1)) for first, last in itertools.pairwise(ends)
    ]
    return median(spent) if spent else None


def read_guard(path: Path) -> tuple[tuple[int, str], ...]:
    """What the reward guard said, by step; a step that was gone through twice is told as it was the last time."""
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    found = (GUARD.fullmatch(line) for line in text.splitlines())
    return tuple(sorted({int(match[1]): match[2] for match in found if match}.items()))


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(lines of a log that are whole, how many are not): a run that is still going may be writing the last."""
    return read_json_lines(path, ("tick", "step"))


def read_json_lines(path: Path, counters: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """``read_lines`` of objects that have whole numbers of these names."""
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
            good.append(record | {name: int(record[name]) for name in counters})
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


def opened(path: Path) -> Image.Image:
    """A PNG of a sample sheet, decoded.  Raises UserError."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "remove its folder: the other steps are shown") from None


def draws_teacher(settings: Mapping[str, Any]) -> bool:
    """Whether the last row of a run's sheets is the teacher's."""
    from train_t2i.methods import METHODS

    return "teacher" in getattr(METHODS.get(str(settings.get("method"))), "uses", ())


def offsets(runs: Sequence[RunStory]) -> list[int]:
    """What to add to each run's steps so that the stages follow each other; a stage may count on from another run's.

    Runs that count on from the same step are drawn over one another.
    """
    begins: list[int] = []
    siblings: dict[int, int] = {}  # first step -> what was added to it
    end = 0
    for run in runs:
        follows = end - max(0, run.first_step - 1) if begins else 0
        begins.append(siblings.setdefault(run.first_step, follows) if run.first_step > 1 else follows)
        end = begins[-1] + run.last_step
    return begins


def thin(sheets: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of them, the first and the last included."""
    if len(sheets) <= limit:
        return list(sheets)
    if limit == 1:
        return [sheets[-1]]
    return [sheets[round(i * (len(sheets) - 1) / (limit - 1))] for i in range(limit)]
