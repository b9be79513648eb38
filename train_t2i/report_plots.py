"""The curves of a report as PNG and PDF files: raw values faint, smoothed ones on top, a colour a run.

Dashed upright lines are the steps at which the reward guard spoke.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.report_data import Points, RunStory, offsets

COLOURS = ("#2f6db5", "#c8553d", "#3a8f5c", "#8457a8", "#b98a1d", "#3d8f99", "#a34a75", "#6b6b6b")
INK, FAINT = "#22252a", "#d9dce1"
# file -> (title of the section, panels: series -> label); a * stands for whatever follows, and goes into the label
FIGURES: dict[str, tuple[str, dict[str, str]]] = {
    "rewards": (
        "Rewards",
        {"gen/reward_clip": "CLIP reward", "gen/reward_hps": "HPS reward"},
    ),
    "watched": (
        "Rewards on fixed prompts",
        {
            "mon/reward_*": "{} reward, fixed prompts",
            "mon/held_out_*": "{} reward, held out",
            "mon/diversity": "diversity of a prompt's images",
            "mon/recall": "recall of the reference",
            "mon/guard_scale": "reward guard, share left of the rewards' weights",
        },
    ),
    "losses": (
        "Losses",
        {
            "gen/loss": "generator, all terms",
            "gen/loss_dmd": "distribution matching",
            "gen/loss_clip": "CLIP term",
            "gen/loss_hps": "HPS term",
            "gui/loss": "guidance network",
            "gen/score_gap": "score gap",
        },
    ),
    "gradients": (
        "Gradient norms and learning rates",
        {
            "gen/grad_norm": "generator, gradient norm",
            "gui/grad_norm": "guidance network, gradient norm",
            "gen/lr": "generator, learning rate",
            "gui/lr": "guidance network, learning rate",
        },
    ),
    "speed": ("Speed", {"gui/seconds_tick": "seconds a tick", "gen/seconds_tick": "seconds a generator tick"}),
}
LOG_SCALE = ("grad_norm", "lr")
EXACT = ("lr", "guard_scale")  # series that are drawn as they are
SMOOTHING = 0.04  # share of a curve's points that its running mean is over
LEAST_POINTS = 12  # of a curve that is smoothed
JUDGED = ("mon/", "gen/reward_")  # series whose panels show what the guard said


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def smooth(values: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Centred running mean over ``share`` of the points, at least 5; at the ends over those that are there."""
    half = max(2, round(len(values) * share / 2))
    totals = [0.0]
    for value in values:
        totals.append(totals[-1] + value)
    out = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        out.append((totals[high] - totals[low]) / (high - low))
    return out


@dataclass(frozen=True)
class Curve:
    """A run's series in a panel."""

    run: int  # its place among the runs, which chooses the colour
    offset: int  # what is added to its steps
    points: Points


def draw_panel(axes: Any, label: str, curves: Sequence[Curve], *, log: bool, smoothing: float) -> None:
    """``smoothing``: share of the points; 0 draws the values alone."""
    for curve in curves:
        steps, values = curve.points
        places = [step + curve.offset for step in steps]
        colour = {"color": colour_of(curve.run)}
        if len(values) < LEAST_POINTS or not smoothing:
            marker = "o" if len(values) < LEAST_POINTS else None
            axes.plot(places, values, marker=marker, markersize=3, linewidth=1.4, **colour)
            continue
        axes.plot(places, values, linewidth=0.6, alpha=0.28, **colour)
        axes.plot(places, smooth(values, smoothing), linewidth=1.7, **colour)
    if log and all(value > 0 for curve in curves for value in curve.points[1]):
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        if high < 1.5 * low:  # all but constant: no empty axis of rounding errors
            axes.set_ylim(low / 2, high * 2)
    axes.set_title(label, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("generator steps", fontsize=8, color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.margins(x=0.02)


def expanded(panels: dict[str, str], runs: Sequence[RunStory]) -> dict[str, str]:
    """Panels without a ``*``: one for each series that some run has."""
    found: dict[str, str] = {}
    for key, label in panels.items():
        prefix, star, _ = key.partition("*")
        names = [name for run in runs for name in run.series if star and name.startswith(prefix)]
        found |= {name: label.format(name.removeprefix(prefix)) for name in names} if star else {key: label}
    return found


def draw_figure(runs: Sequence[RunStory], panels: dict[str, str], path: Path, smoothing: float) -> bool:
    """``path`` with .png and .pdf; False, and none, where no run has any of the series."""
    begins = offsets(runs)
    shown = []
    for key, label in expanded(panels, runs).items():
        curves = [Curve(i, begins[i], run.series[key]) for i, run in enumerate(runs) if key in run.series]
        if curves:
            shown.append((key, label, curves))
    if not shown:
        return False
    import matplotlib.figure

    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = matplotlib.figure.Figure(figsize=(5.2 * columns, 2.7 * rows + 0.35), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(shown):
            axes.set_visible(False)
            continue
        key, label, curves = shown[i]
        share = 0.0 if key.endswith(EXACT) else smoothing
        draw_panel(axes, label, curves, log=key.endswith(LOG_SCALE), smoothing=share)
        if key.startswith(JUDGED):
            mark_guard(axes, runs, curves)
    add_legend(figure, runs, {curve.run for _, _, curves in shown for curve in curves})
    figure.savefig(path.with_suffix(".png"), facecolor="white")
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return True


def mark_guard(axes: Any, runs: Sequence[RunStory], curves: Sequence[Curve]) -> None:
    for curve in curves:
        for step, _ in runs[curve.run].guard:
            axes.axvline(
                step + curve.offset, color=colour_of(curve.run), linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7
            )


def add_legend(figure: Any, runs: Sequence[RunStory], used: set[int]) -> None:
    if len(runs) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour_of(i), linewidth=2) for i in sorted(used)]
    names = [runs[i].name.replace("$", r"\$") for i in sorted(used)]
    figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 5), fontsize=8, frameon=False)


def draw_all(runs: Sequence[RunStory], folder: Path, smoothing: float = SMOOTHING) -> dict[str, Path]:
    """Section title -> its PNG, for the figures that have something to show; a PDF of each lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (title, panels) in FIGURES.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        path.with_suffix(".pdf").unlink(missing_ok=True)
        if draw_figure(runs, panels, path, smoothing):
            drawn[title] = path
    return drawn
