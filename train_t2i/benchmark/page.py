"""A benchmark's rows for people: a table in Markdown, and a picture of where each step's seconds go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_t2i.benchmark.rows import WITHOUT_FIGURES
from train_t2i.plan import MODELS

# What every row says of itself, in the words of the table; those that all rows share are told once, above it
NAMED = {
    "model": "model", "layout": "layout", "schedule": "schedule", "backend": "backend", "num_processes": "processes",
    "mixed_precision": "format", "gradient_checkpointing": "checkpointing", "compile": "compile", "batch_size": "batch",
    "resolution": "px", "sample_num_steps": "N", "ratio_update": "R", "rewards": "rewards", "device": "device",
}  # fmt: skip
PHASES = {  # phase of a step -> its colour: of one hue what the guidance network and the generator do
    "data": "#6b6b6b", "text_encoding": "#b98a1d", "rollout": "#8fb8e0", "guidance_update": "#2f6db5",
    "generator_update": "#c8553d", "rewards_forward": "#e6a894",
}  # fmt: skip
INK, FAINT = "#22252a", "#d9dce1"


def words(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if key == "model" and value not in MODELS:
        return Path(value).name
    return str(value)


def told_apart(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which rows differ."""
    return [key for key in NAMED if len({str(row[key]) for row in rows if key in row}) > 1]


def ratio_to_published(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds and peak over those of the published schedule: of the row that is else the same, but for our own switches."""
    apart = ("schedule", "gradient_checkpointing", "compile")
    for other in rows:
        same = all(other.get(key) == row.get(key) for key in NAMED if key not in apart)
        if same and other["schedule"] == "published" and "seconds_step" in other and row["schedule"] == "ours":
            return {
                "seconds": row["seconds_step"] / other["seconds_step"],
                "peak": row["peak_memory_gib"] / other["peak_memory_gib"],
            }
    return None


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: what all rows share, and a line a row."""
    apart = told_apart(rows)
    shared = [f"{NAMED[key]} {words(key, rows[0][key])}" for key in NAMED if key in rows[0] and key not in apart]
    columns = [NAMED[key] for key in apart]
    columns += ["s a step", "of published", "images/s", "outside network", "peak GiB", "of published", "TFLOP/s", "MFU"]
    lines = [", ".join(shared) + ".", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [words(key, row.get(key, "")) for key in apart]
        lines.append(f"| {' | '.join(cells + figures(row, rows))} |")
    return lines


def figures(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    for why in WITHOUT_FIGURES:
        if why in row:
            return [f"{why.replace('_', ' ')}: {row[why]}".replace("|", "/"), *[""] * 7]
    ratio, used = ratio_to_published(row, rows), row["model_flop_utilisation"]
    return [
        f"{row['seconds_step']:.3g}", f"{ratio['seconds']:.2f}" if ratio else "", f"{row['images_per_second']:.3g}",
        f"{row['share_outside_network_calls']:.0%}", f"{row['peak_memory_gib']:.2f}",
        f"{ratio['peak']:.2f}" if ratio else "", f"{row['network_flops_per_second'] / 1e12:.3g}",
        f"{used:.0%}" if used is not None else "",
    ]  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """``path`` with .png and .pdf: a bar a row that has figures, its phases side by side; nothing without such a row."""
    import matplotlib.figure

    shown = [row for row in rows if "seconds_step" in row]
    if not shown:
        return
    apart = told_apart(rows)
    figure = matplotlib.figure.Figure(figsize=(10, 0.36 * len(shown) + 1.3), layout="constrained", dpi=130)
    axes = figure.subplots()
    longest = max(row["seconds_step"] for row in shown)
    for place, row in enumerate(shown):
        start = 0.0
        for phase, colour in PHASES.items():
            seconds = row["seconds_of_a_step"].get(phase, 0.0)
            axes.barh(place, seconds, left=start, height=0.68, color=colour, edgecolor="white", linewidth=0.6)
            start += seconds
        axes.text(row["seconds_step"] + 0.012 * longest, place, note(row, rows), va="center", fontsize=8, color=INK)
    labels = [", ".join(label(key, row) for key in apart) or words("model", row["model"]) for row in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.7 * longest)  # what is told beside a bar takes room
    axes.set_xlabel("seconds of a step", fontsize=8, color=INK, loc="left")
    axes.tick_params(which="both", labelsize=8, colors=INK, length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    add_legend(figure, shown)
    figure.savefig(path.with_suffix(".png"), facecolor="white")
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def label(key: str, row: dict[str, Any]) -> str:
    """A setting that says by itself what it is of, or with its name."""
    value = words(key, row.get(key, ""))
    if key == "gradient_checkpointing":
        return {"on": "checkpointed", "off": "not checkpointed"}.get(value, f"checkpointed ({value})")
    if key == "rewards":
        return f"{value if row.get(key) else 'no'} rewards"
    if key == "compile":
        return "compiled" if value == "blocks" else "eager"
    alone = key in ("model", "layout", "schedule", "backend", "mixed_precision", "device")
    return value if alone else f"{NAMED[key]} {value}"


def note(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    ratio = ratio_to_published(row, rows)
    peak = f"{row['seconds_step']:.3g} s, {row['peak_memory_gib']:.3g} GiB"
    return peak + (f" ({ratio['seconds']:.2f} and {ratio['peak']:.2f} of published)" if ratio else "")


def add_legend(figure: Any, shown: Sequence[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    there = [phase for phase in PHASES if any(row["seconds_of_a_step"].get(phase, 0) > 0 for row in shown)]
    marks = [Patch(color=PHASES[phase], label=phase.replace("_", " ")) for phase in there]
    figure.legend(
        handles=marks, loc="outside upper center", ncols=len(marks), fontsize=8, frameon=False, labelcolor=INK,
        handlelength=1.1, columnspacing=1.4,
    )  # fmt: skip
