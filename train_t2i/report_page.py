"""The HTML of a report: one file, nothing loaded from anywhere, every word from a run escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train_t2i.pages.parts import SMALL_PX, data_uri, document, esc, text_of, webp
from train_t2i.report_data import RunStory, Sheet, draws_teacher, opened, thin
from train_t2i.report_plots import COLOURS, LEAST_POINTS
from train_t2i.report_tables import (
    Table,
    cost_table,
    duration,
    environment_table,
    evaluation,
    guard_table,
    settings_table,
)

MAX_WIDTH_PX = 1400  # of an embedded sample sheet


def colour_class(index: int) -> str:
    """Of what belongs to a run; see ``colour_rules``."""
    return f"run{index % len(COLOURS)}"


def colour_rules() -> str:
    return "".join(f".run{i} {{ --colour: {colour}; }}\n" for i, colour in enumerate(COLOURS))


# -- sections --------------------------------------------------------------------------------------------------------


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
    return f'<div class="card {colour_class(index)}"><b>{esc(run.name)}</b><dl>{body}</dl></div>'


def sheet_figure(sheet: Sheet) -> tuple[str, int]:
    """(HTML, width in px)."""
    image = opened(sheet.grid)
    uri, width = webp(image, MAX_WIDTH_PX), min(image.width, MAX_WIDTH_PX)
    caption = f"<figcaption><b>step {sheet.step}</b></figcaption>"
    return f'<figure>{caption}<img src="{uri}" alt="samples at step {sheet.step}"></figure>', width


def timeline(index: int, run: RunStory, limit: int) -> tuple[str, str]:
    """(HTML, style): the sheets of a run; with a script one at a time, by a slider."""
    shown = thin(run.sheets, limit)
    figures, widths = zip(*(sheet_figure(sheet) for sheet in shown), strict=True)
    told = "".join(f"<li>{esc(prompt)}</li>" for prompt in shown[-1].prompts)
    left_out = f", {len(run.sheets) - len(shown)} more are in the run's folder" if len(shown) < len(run.sheets) else ""
    rows = "Top row: student; bottom row: teacher." if draws_teacher(run.settings) else ""
    slider = (
        f'<div class=slider hidden><input type=range min=0 max="{len(shown) - 1}" value="{len(shown) - 1}" '
        'aria-label="step of the samples"> <output></output> <button aria-pressed=false>All steps</button></div>'
        if len(shown) > 1
        else ""
    )
    small = " class=small" if max(widths) < SMALL_PX else ""
    html = (
        f'<section class=timeline><h3><span class="dot {colour_class(index)}"></span>{esc(run.name)}</h3>'
        f"<p class=soft>{esc(rows)} The same noise and prompts at every step{esc(left_out)}.</p>"
        f"<details><summary>prompts, left to right</summary><ol>{told}</ol></details>{slider}"
        f'<div class=sheets id="sheets{index}"{small}>{"".join(figures)}</div></section>'
    )
    return html, f"#sheets{index} {{ --width: {max(widths)}px; }}\n"


def plot(number: int, title: str, path: Path, smoothing: float) -> str:
    """A numbered figure with what a reader must know of it."""
    smoothed = (
        f"faint: as logged; strong: centred running mean over {smoothing:.0%} of a curve's points, 5 at least "
        f"(curves of fewer than {LEAST_POINTS}, learning rates and the guard's share as they are)"
        if smoothing
        else "as logged"
    )
    guard = "; dashed: the reward guard spoke" if "ewards" in title else ""
    return (
        f'<figure class=plot><img src="{data_uri(path.read_bytes(), "png")}" alt="{esc(title)}">'
        f"<figcaption><b>Figure {number}.</b> {esc(title)}: {esc(smoothed)}{guard}. "
        f"Vector: plots/{esc(path.stem)}.pdf</figcaption></figure>"
    )


def page(
    title: str,
    runs: Sequence[RunStory],
    plots: Mapping[str, Path],
    tables: Sequence[Table],
    limit: int,
    smoothing: float,
) -> str:
    """The whole document."""
    sections: dict[str, str] = {}
    style = text_of("report.css") + colour_rules()
    if tables:
        sections["Evaluation"] = "".join(evaluation(table) for table in tables)
    sampled = [timeline(i, run, limit) for i, run in enumerate(runs) if run.sheets]
    if sampled:
        sections["Samples"] = "".join(html for html, _ in sampled)
        style += "".join(rule for _, rule in sampled)
    for number, (name, path) in enumerate(plots.items(), 1):
        sections[name] = plot(number, name, path, smoothing)
    told = {"Reward guard": guard_table(runs), "Cost": cost_table(runs), "Environment": environment_table(runs)}
    sections |= {name: html for name, html in told.items() if html}
    sections["Settings"] = settings_table(runs)
    links = "".join(f'<a href="#s{i}">{esc(name)}</a>' for i, name in enumerate(sections))
    body = "".join(f'<h2 id="s{i}">{esc(name)}</h2>{text}' for i, (name, text) in enumerate(sections.items()))
    cards = "".join(card(i, run) for i, run in enumerate(runs))
    stages = "one run" if len(runs) == 1 else f"{len(runs)} runs, in the order given"
    main = (
        f"<main><header><h1>{esc(title)}</h1><p class=soft>{esc(stages)}</p><nav>{links}</nav></header>"
        f"<div class=cards>{cards}</div>{body}</main>"
    )
    return document(title, main, style, text_of("report.js"))
