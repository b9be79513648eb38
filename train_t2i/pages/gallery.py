"""The HTML of a gallery: a row a prompt, the teacher first, then the student at each step; search, order, one step alone.

Everything is in the markup, so that it shows without a script too; the script hides, sorts and enlarges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from train_t2i.gallery_images import Column, Key
from train_t2i.pages.parts import SMALL_PX, document, esc, in_script, text_of
from train_t2i.report_data import RunStory


@dataclass(frozen=True)
class Picture:
    """An image of the page."""

    uri: str
    size_px: tuple[int, int]  # (width, height) before it was scaled down
    scores: Mapping[str, float] = field(default_factory=dict)


Cells = Sequence[Mapping[Key, Picture]]  # a column


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def mean_cell(value: float | None) -> str:
    return f"<td>{'' if value is None else number(value)}</td>"


def score_names(cells: Cells) -> list[str]:
    return list(dict.fromkeys(name for column in cells for picture in column.values() for name in picture.scores))


def logged(run: RunStory, name: str, step: int | None) -> float | None:
    """What the run read of its fixed prompts at a step."""
    places, values = run.series[name]
    return next((value for place, value in zip(places, values, strict=True) if place == step), None)


def mean_table(run: RunStory, columns: Sequence[Column], cells: Cells) -> str:
    """A line a score: its mean over the images of each column, then what the run itself logged at those steps."""
    lines: list[tuple[str, list[float | None]]] = []
    for name in score_names(cells):
        found = [[picture.scores[name] for picture in column.values()] for column in cells]
        lines.append((name, [fmean(values) if values else None for values in found]))
    for name in sorted(name for name in run.series if name.startswith("mon/")):
        values = [logged(run, name, column.step) for column in columns]
        if any(value is not None for value in values):
            lines.append((f"{name.removeprefix('mon/')} (logged)", values))
    if not lines:
        return ""
    heads = "".join(f"<th>{esc(column.name)}</th>" for column in columns)
    rows = "".join(f"<tr><th>{esc(name)}</th>{''.join(map(mean_cell, values))}</tr>" for name, values in lines)
    return (
        "<details open><summary>Mean scores by step</summary><div class=wide>"
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def figure(place: int, column: Column, picture: Picture | None, prompt: str) -> str:
    if picture is None:
        return f'<figure data-column="{place}"></figure>'
    told = "".join(f"<span>{esc(name)} {number(value)}</span>" for name, value in picture.scores.items())
    kind = " class=small" if picture.size_px[0] < SMALL_PX else ""
    alt = f"{column.name}: {prompt}"
    return (
        f'<figure data-column="{place}"><img{kind} src="{picture.uri}" alt="{esc(alt)}" decoding=async>'
        f"<figcaption><b>{esc(column.name)}</b>{told}</figcaption></figure>"
    )


def article(row: int, key: Key, columns: Sequence[Column], cells: Cells) -> str:
    figures = "".join(figure(place, column, cells[place].get(key), key[0]) for place, column in enumerate(columns))
    return (
        f'<article data-row="{row}"><p><span class=soft>{row + 1}</span> <span class=prompt>{esc(key[0])}</span></p>'
        f"<div class=row>{figures}</div></article>"
    )


def orders(columns: Sequence[Column], cells: Cells) -> str:
    """What rows can be sorted by: scores of the last step, and where there is a teacher their difference to its."""
    last, taught = columns[-1].name, columns[0].step is None
    options = ['<option value="">as they stand</option>']
    for name in score_names(cells):
        options += [
            f'<option value="{esc(name)}|low|last">{esc(name)} of {esc(last)}, lowest first</option>',
            f'<option value="{esc(name)}|high|last">{esc(name)} of {esc(last)}, highest first</option>',
        ]
        if taught and len(columns) > 1:
            options.append(
                f'<option value="{esc(name)}|low|gain">{esc(name)}, {esc(last)} less teacher, lowest first</option>'
            )
    return f"<label>order <select id=order>{''.join(options)}</select></label>" if len(options) > 1 else ""


def toolbar(columns: Sequence[Column], cells: Cells) -> str:
    steps = sum(column.step is not None for column in columns)
    slider = (
        f'<button id=all aria-pressed=true>All steps</button><label><input type=range id=step min=0 max="{steps - 1}" '
        f'value="{steps - 1}" aria-label="one step"> <output id=chosen></output></label>'
        if steps > 1
        else ""
    )
    return (
        '<div class=bar id=bar hidden><input type=search id=search placeholder="words of a prompt" aria-label="search prompts">'
        f"<span id=count class=soft role=status></span><span class=grow></span>{orders(columns, cells)}{slider}</div>"
    )


def data_of(columns: Sequence[Column], cells: Cells, keys: Sequence[Key]) -> dict[str, Any]:
    """What the page's script is given: column names, and each row's scores."""
    scores = {
        name: [[column[key].scores.get(name) if key in column else None for column in cells] for key in keys]
        for name in score_names(cells)
    }
    return {"columns": [column.name for column in columns], "taught": columns[0].step is None, "scores": scores}


def facts(run: RunStory, columns: Sequence[Column], cells: Cells, keys: Sequence[Key]) -> str:
    """One line below the heading: how many prompts, which student, how large the images are."""
    every = [picture for column in cells for picture in column.values()]
    widths = {picture.size_px for picture in every}
    sizes = ", ".join(f"{width} x {height} px" for width, height in sorted(widths))
    told = [
        f"{len(keys):,} prompt{'s' if len(keys) != 1 else ''}",
        f"method {run.settings.get('method', '?')}",
        f"{run.settings.get('sample_num_steps', '?')}-step student" if run.settings.get("method") != "sft" else "",
        f"images made at {sizes}" if sizes else "",
        "the same noise in every column",
    ]
    return " · ".join(filter(None, told))


def page(title: str, run: RunStory, columns: Sequence[Column], shown: Sequence[Sequence[Picture]]) -> str:
    """The whole document; ``shown`` are each column's pictures in the order of its keys."""
    cells = [dict(zip(column.keys, pictures, strict=True)) for column, pictures in zip(columns, shown, strict=True)]
    newest_first = dict.fromkeys(key for column in reversed(columns) for key in column.keys)
    keys = list(newest_first)
    style = text_of("gallery.css") + f"\nmain {{ --columns: {len(columns)}; }}"
    rows = "".join(article(row, key, columns, cells) for row, key in enumerate(keys))
    told = f'<script type="application/json" id="data">{in_script(data_of(columns, cells, keys))}</script>'
    dialog = (
        "<dialog id=large autofocus><p id=large-prompt></p><div class=two><figure id=large-left></figure>"
        "<figure id=large-right></figure></div><p class=soft><span>step<kbd>←</kbd><kbd>→</kbd></span> "
        "<span>prompt<kbd>↑</kbd><kbd>↓</kbd></span> <span>close<kbd>Esc</kbd></span></p></dialog>"
    )
    head = f"<h1>{esc(title)}</h1><p class=soft>{esc(facts(run, columns, cells, keys))}</p>"
    body = (
        f"<header>{head}{mean_table(run, columns, cells)}</header>{toolbar(columns, cells)}"
        f"<main>{rows}<p id=none class=soft hidden>No prompt has these words.</p></main>{dialog}{told}"
    )
    return document(title, body, style, text_of("gallery.js"))
