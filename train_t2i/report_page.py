"""The HTML of a report: one file, nothing loaded from anywhere, every word from a run escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i import redact
from train_t2i.config import METHOD_NAMES, fields_of
from train_t2i.report_data import RunStory, Sheet, thin
from train_t2i.report_plots import colour_of

MAX_WIDTH_PX = 1400  # of an embedded sample sheet
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
# Sizes of grids of images follow the width of the images.
STYLE = """
:root { --ink: #22252a; --soft: #636a75; --line: #e3e6ea; --mark: #fff3d1; --accent: #2f6db5; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 6px 0; max-width: 72ch; } .soft { color: var(--soft); }
nav { margin: 14px 0 0; } nav a { color: var(--accent); text-decoration: none; margin-right: 18px; }
img { max-width: 100%; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; margin-top: 26px; }
.card { border: 1px solid var(--line); border-top: 4px solid var(--colour); border-radius: 6px; padding: 12px 16px 14px; }
.card b { display: block; font-size: 16px; overflow-wrap: anywhere; } .card dl { margin: 8px 0 0; }
.card dl div { display: flex; justify-content: space-between; gap: 12px; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 6px 8px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; } th { font-weight: 600; font-size: 13px; vertical-align: bottom; white-space: normal; }
th small { display: block; } small { color: var(--soft); font-weight: 400; } td small { display: block; } td.best { font-weight: 700; }
table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; font-size: 14px; } table.settings th { text-align: left; }
tr.differs td { background: var(--mark); } .dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; background: var(--colour); }
figure { margin: 0 0 18px; } figcaption { font-size: 14px; margin-bottom: 4px; } figcaption b { font-variant-numeric: tabular-nums; }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--width) * 0.8)), 1fr)); gap: 8px 22px; }
.sheets img { border: 1px solid var(--line); border-radius: 4px; width: 100%; max-width: calc(var(--width) * 1.6); }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); } ol { margin: 6px 0; padding-left: 28px; font-size: 14px; }
@media print { main { max-width: none; } details { display: none; } }
"""


@dataclass(frozen=True)
class Table:
    """An evaluation table: its file's name and its rows."""

    name: str
    rows: tuple[Mapping[str, Any], ...]


def esc(value: Any) -> str:
    """For a page that may be shown to anybody: runs of older versions may hold secrets."""
    return html.escape(redact.clean(str(value)), quote=True)


def embedded(path: Path, max_width_px: int = 0) -> tuple[str, int]:
    """(data URI of a PNG, its width in px), scaled down where it is wider than ``max_width_px``."""
    data = path.read_bytes()
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        width = image.width
        if max_width_px and width > max_width_px:
            buffer = io.BytesIO()
            image.resize((max_width_px, round(image.height * max_width_px / width))).save(buffer, "PNG")
            data, width = buffer.getvalue(), max_width_px
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii"), width


# -- sections --------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def network_calls(settings: Mapping[str, Any]) -> Any:
    """Of an image, as ``evaluate`` counts them: a guided call is two."""
    if settings.get("method") != "sft":
        return settings.get("sample_num_steps")
    steps = settings.get("teacher_num_steps")
    return steps * 2 if isinstance(steps, int) and settings.get("teacher_cfg", 1) != 1 else steps


def card(index: int, run: RunStory) -> str:
    facts = {
        "method": run.settings.get("method", "?"),
        "network calls": network_calls(run.settings),
        "generator steps": run.last_step,
        "samples seen": f"{run.samples_seen:,}",
        "time in ticks": duration(run.seconds),
    }
    if run.peak_memory_gib:
        facts["peak memory"] = f"{run.peak_memory_gib:.2f} GiB"
    for key, label in (("gen/reward_clip", "CLIP reward"), ("gen/reward_hps", "HPS reward")):
        if key in run.series:
            values = run.series[key][1]
            tail = values[-max(1, len(values) // 10) :]
            facts[f"last {label}"] = f"{sum(tail) / len(tail):.4f}"
    if run.unreadable:
        facts["unreadable log lines"] = run.unreadable
    body = "".join(f"<div><dt>{esc(key)}</dt><dd>{esc(value)}</dd></div>" for key, value in facts.items())
    return f'<div class="card" style="--colour:{colour_of(index)}"><b>{esc(run.name)}</b><dl>{body}</dl></div>'


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


def sheet_figure(sheet: Sheet) -> tuple[str, int]:
    """(HTML, width in px)."""
    uri, width = embedded(sheet.grid, MAX_WIDTH_PX)
    caption = f"<figcaption><b>step {sheet.step}</b></figcaption>"
    return f'<figure>{caption}<img src="{uri}" alt="samples at step {sheet.step}"></figure>', width


def timeline(index: int, run: RunStory, limit: int) -> str:
    shown = thin(run.sheets, limit)
    figures, widths = zip(*(sheet_figure(sheet) for sheet in shown), strict=True)
    told = "".join(f"<li>{esc(prompt)}</li>" for prompt in shown[-1].prompts)
    left_out = f", {len(run.sheets) - len(shown)} more are in the run's folder" if len(shown) < len(run.sheets) else ""
    two_rows = run.settings.get("method") == "dmdr"
    rows = "Top row: student; bottom row: teacher." if two_rows else ""
    return (
        f'<h3><span class=dot style="--colour:{colour_of(index)}"></span>{esc(run.name)}</h3>'
        f"<p class=soft>{esc(rows)} The same noise and prompts at every step{esc(left_out)}.</p>"
        f"<details><summary>prompts, left to right</summary><ol>{told}</ol></details>"
        f'<div class=sheets style="--width:{max(widths)}px">{"".join(figures)}</div>'
    )


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


def page(title: str, runs: Sequence[RunStory], plots: Mapping[str, Path], tables: Sequence[Table], limit: int) -> str:
    """The whole document."""
    sections: dict[str, str] = {}
    if tables:
        sections["Evaluation"] = "".join(evaluation(table) for table in tables)
    sampled = [(i, run) for i, run in enumerate(runs) if run.sheets]
    if sampled:
        sections["Samples"] = "".join(timeline(i, run, limit) for i, run in sampled)
    for name, path in plots.items():
        sections[name] = f'<img src="{embedded(path)[0]}" alt="{esc(name)}">'
    sections["Settings"] = settings_table(runs)
    links = "".join(f'<a href="#s{i}">{esc(name)}</a>' for i, name in enumerate(sections))
    body = "".join(f'<h2 id="s{i}">{esc(name)}</h2>{text}' for i, (name, text) in enumerate(sections.items()))
    cards = "".join(card(i, run) for i, run in enumerate(runs))
    stages = "one run" if len(runs) == 1 else f"{len(runs)} runs, in the order given"
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{esc(title)}</h1><p class=soft>{esc(stages)}</p><nav>{links}</nav></header>"
        f"<div class=cards>{cards}</div>{body}</main></body></html>\n"
    )
