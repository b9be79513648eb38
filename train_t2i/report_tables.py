"""The tables of a report: evaluation, cost, environment, settings; HTML with every word from a run escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train_t2i.config import METHOD_NAMES, fields_of
from train_t2i.pages.parts import esc
from train_t2i.report_data import RunStory

HIGHER, LOWER = "higher is better", "lower is better"
# key of a table -> (heading, which way is better, digits)
COLUMNS: dict[str, tuple[str, str, str]] = {
    "network_calls": ("network calls", "", "d"),
    "adherence": ("adherence", HIGHER, ".3f"),
    "clip": ("CLIP", HIGHER, ".4f"),
    "hps": ("HPS", HIGHER, ".4f"),
    "held_out": ("held-out CLIP", HIGHER, ".4f"),
    "frechet": ("Fréchet distance", LOWER, ".4f"),
    "kid": ("kernel distance", LOWER, ".4f"),
    "recall": ("recall", HIGHER, ".3f"),
    "precision": ("precision", HIGHER, ".3f"),
    "diversity": ("diversity", HIGHER, ".4f"),
    "fid": ("FID", LOWER, ".2f"),
    "kid_inception": ("KID", LOWER, ".5f"),
    "ms_per_image": ("ms an image", LOWER, ".1f"),
}


@dataclass(frozen=True)
class Table:
    """An evaluation table: its file's name and its rows."""

    name: str
    rows: tuple[Mapping[str, Any], ...]


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML already."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows)
    mark = f' class="{kind}"' if kind else ""
    return f"<div class=wide><table{mark}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# -- evaluation ------------------------------------------------------------------------------------------------------


def cell(row: Mapping[str, Any], key: str, digits: str, best: Any) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{'–' if value is None else esc(value)}</td>"
    text = format(value, digits if not (digits == "d" and isinstance(value, float)) else "g")
    ci = row.get("ci")
    interval = ci.get(key) if isinstance(ci, dict) else None
    if isinstance(interval, list | tuple) and len(interval) == 2:
        text += f"<small>{format(interval[0], digits)} to {format(interval[1], digits)}</small>"
    return f"<td{' class=best' if value == best else ''}>{text}</td>"


def best_of(rows: Sequence[Mapping[str, Any]], key: str, direction: str) -> Any:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    if not direction or len(values) < 2:
        return None
    return max(values) if direction == HIGHER else min(values)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """What the rows hold, rewards that have no column of their own included."""
    rewards = {name for row in rows if isinstance(row.get("rewards"), list) for name in row["rewards"]}
    known = COLUMNS | {name: (name, HIGHER, ".4f") for name in sorted(map(str, rewards)) if name not in COLUMNS}
    return {key: column for key, column in known.items() if any(row.get(key) is not None for row in rows)}


def evaluation(table: Table) -> str:
    columns = columns_of(table.rows)
    best = {key: best_of(table.rows, key, direction) for key, (_, direction, _) in columns.items()}
    heads = "".join(f"<th>{esc(name)}<small>{esc(direction)}</small></th>" for name, direction, _ in columns.values())
    lines = [
        f"<tr><td>{esc(row.get('model'))}</td>"
        + "".join(cell(row, key, digits, best[key]) for key, (_, _, digits) in columns.items())
        + "</tr>"
        for row in table.rows
    ]
    counts = sorted({str(row.get("count")) for row in table.rows if row.get("count")})
    note = f"{' or '.join(counts)} prompts a model; " if counts else ""
    return (
        f"<h3>{esc(table.name)}</h3><div class=wide><table><thead><tr><th>model</th>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f"<p class=soft>{esc(note)}small print: 95 % bootstrap intervals; bold: the best of a column.</p>"
    )


# -- cost and environment --------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def cost_table(runs: Sequence[RunStory]) -> str:
    """What the runs took, a line a run, and all of them together."""

    def hours(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds / 3600:.2f}"

    rows = [
        [
            esc(run.name),
            f"{run.last_step - max(0, run.first_step - 1):,}",
            f"{run.samples_seen:,}",
            "–" if run.seconds_step is None else f"{run.seconds_step:.3g}",
            duration(run.seconds),
            hours(run.device_seconds),
            f"{run.peak_memory_gib:.2f}" if run.peak_memory_gib else "–",
        ]
        for run in runs
    ]
    if len(runs) > 1:
        known = [run.device_seconds for run in runs if run.device_seconds is not None]
        total = sum(known) if len(known) == len(runs) else None
        rows.append(["all", "", "", "", duration(sum(run.seconds for run in runs)), hours(total), ""])
    heads = ["run", "steps here", "samples seen", "median seconds a step", "time", "device hours", "peak GiB a device"]
    return grid(heads, rows) + (
        "<p class=soft>Time of all ticks that count, with sampling and saving, without loading; device hours: that time "
        "times the run's processes. Peak of the main process: of its GPU, or of its resident memory on a CPU.</p>"
    )


def environment_table(runs: Sequence[RunStory]) -> str:
    """A line a start of a run; empty where no run says what it ran on."""
    rows = [
        [
            esc(run.name),
            esc(start.get("started", "")),
            esc(start["tick"]),
            f"{esc(start['num_processes'])} x {esc(start.get('device', '?'))}",
            esc(start.get("backend", "") if start["num_processes"] > 1 else "–"),
            esc(software(start)),
        ]
        for run in runs
        for start in run.starts
    ]
    heads = ["run", "started", "from tick", "devices", "shared by", "software"]
    return grid(heads, rows, "settings") if rows else ""


def software(start: Mapping[str, Any]) -> str:
    packages = start.get("packages")
    named = [f"{name} {found}" for name, found in packages.items()] if isinstance(packages, dict) else []
    code, python, system = (start.get(key, "?") for key in ("code_version", "python", "system"))
    return ", ".join([f"train_t2i {code}", f"Python {python}", *named, str(system)])


def guard_table(runs: Sequence[RunStory]) -> str:
    """What the reward guards said; empty where they said nothing."""
    rows = [[esc(run.name), esc(step), esc(said)] for run in runs for step, said in run.guard]
    return grid(["run", "step", "what the guard said"], rows, "settings") if rows else ""


# -- settings --------------------------------------------------------------------------------------------------------


def shown_value(value: Any) -> str:
    return "–" if value is None else esc(value) if value != "" else "(empty)"


def defaults_of(method: Any) -> dict[str, Any]:
    return {name: f.default for name, f in fields_of(method).items()} if method in METHOD_NAMES else {}


def settings_table(runs: Sequence[RunStory]) -> str:
    """Settings that differ between the runs first (of one run: that are not the defaults); the rest folded away."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    missing = object()

    def differs(name: str) -> bool:
        values = [run.settings.get(name, missing) for run in runs]
        if len(runs) == 1:
            return values[0] != defaults_of(runs[0].settings.get("method")).get(name, values[0])
        return any(value != values[0] for value in values)

    def line(name: str) -> str:
        cells = "".join(f"<td>{shown_value(run.settings[name]) if name in run.settings else ''}</td>" for run in runs)
        return f"<tr{' class=differs' if differs(name) else ''}><td>{esc(name)}</td>{cells}</tr>"

    def body(chosen: Sequence[str]) -> str:
        heads = "".join(f"<th>{esc(run.name)}</th>" for run in runs)
        lines = "".join(line(name) for name in chosen)
        return f"<div class=wide><table class=settings><thead><tr><th>setting</th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"

    first = [name for name in names if differs(name)]
    rest = [name for name in names if not differs(name)]
    what = "differ between these runs" if len(runs) > 1 else "are not the defaults"
    told = body(first) if first else "<p class=soft>None.</p>"
    return (
        f"<h3>Settings that {what}</h3>{told}"
        f"<details><summary>the other {len(rest)} settings</summary>{body(rest)}</details>"
    )
