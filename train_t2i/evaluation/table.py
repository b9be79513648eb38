"""The table of models: JSON rows, plain text, Markdown.  A model that is evaluated again replaces its row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train_t2i.errors import UserError

COLUMNS = ("model", "network_calls", "adherence", "clip", "hps", "held_out", "frechet", "recall", "ms_per_image")
# shown where a row has them, before the time
MORE = ("kid", "precision", "diversity", "fid", "kid_inception")
LOWER_IS_BETTER = ("frechet", "kid", "fid", "kid_inception", "ms_per_image", "network_calls")


def read_table(path: str, option: str = "--out") -> list[dict[str, Any]]:
    """The rows of a table; none where there is no file yet."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be read ({error})", "give a table, or a new file") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise UserError(f"{option} {path}: not a table of models", "give a table, or a new file")
    return rows


def read_given_table(path: str) -> list[dict[str, Any]]:
    """The rows of a table that must be there.  Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"--table {path}: no such file", "python -m train_t2i evaluate --out writes one")
    return read_table(path, "--table")


def merge_row(path: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put a row into the table in its model's place, or at the end; the file is whole at any instant."""
    rows = read_table(path)
    places = [i for i, old in enumerate(rows) if old["model"] == row["model"]]
    if places:
        rows[places[0]] = dict(row)
    else:
        rows.append(dict(row))
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return rows


def write_text(path: str, text: str) -> None:
    from train_t2i.storage import write_atomically

    try:
        write_atomically(Path(path), text)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})", "choose another file") from None


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table; beside those that all have, what any row has measured."""
    rewards = dict.fromkeys(name for row in rows for name in row.get("rewards", ()))
    more = [
        name for name in (*rewards, *MORE) if name not in COLUMNS and any(row.get(name) is not None for row in rows)
    ]
    return [*COLUMNS[:-1], *more, COLUMNS[-1]]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain text, a line a model, columns aligned."""
    columns = columns_of(rows)
    lines = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    pad = [str.ljust, *[str.rjust] * (len(columns) - 1)]
    return "\n".join("  ".join(p(text, w) for p, text, w in zip(pad, line, widths)).rstrip() for line in lines)


# -- Markdown --------------------------------------------------------------------------------------------------------


def escaped(value: Any) -> str:
    """Text that no Markdown reader takes for markup or for the end of a cell."""
    text = " ".join(str(value).split())
    for mark in "\\`*_{}[]<>()#|~":
        text = text.replace(mark, "\\" + mark)
    return text


def with_interval(value: Any, interval: Any) -> str:
    if value is None or interval is None:
        return cell(value)
    return f"{value:.4g} ({interval[0]:.4g} to {interval[1]:.4g})"


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a model, with the columns that any of them has measured, means with their intervals."""
    columns = [name for name in columns_of(rows) if name == "model" or any(row.get(name) is not None for row in rows)]
    heads = [f"{name} (lower is better)" if name in LOWER_IS_BETTER else name for name in columns]
    lines = [markdown_row(heads), markdown_row(["---", *["---:"] * (len(columns) - 1)])]
    for row in rows:
        ci = row.get("ci", {})
        cells = [escaped(row["model"]), *(with_interval(row.get(name), ci.get(name)) for name in columns[1:])]
        lines.append(markdown_row(cells))
    return lines


def markdown(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """The table with its intervals, the paired differences, and what both rest on."""
    lines = ["# Evaluation", "", *markdown_table(rows)]
    lines += ["", "In brackets: 95 % bootstrap intervals of the mean over prompts."]
    lines += ["", *paired_lines(pairs), *basis_lines(rows)]
    return "\n".join(lines) + "\n"


def paired_lines(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not pairs:
        return []
    lines = [
        "## Paired differences",
        "",
        "A minus B of each prompt, with its 95 % bootstrap interval; bold: it leaves 0 out.",
        "",
    ]
    names = list(dict.fromkeys(name for pair in pairs for name in pair["differences"]))
    lines += [markdown_row(["A - B", "noise", *names]), markdown_row(["---", "---", *["---:"] * len(names)])]
    for pair in pairs:
        found = pair["differences"]
        cells = [difference(found[name]) if name in found else "-" for name in names]
        noise = {True: "same", False: "other", None: "unknown"}[pair["same_noise"]]
        lines.append(markdown_row([f"{escaped(pair['a'])} - {escaped(pair['b'])}", noise, *cells]))
    return [*lines, ""]


def difference(found: Mapping[str, Any]) -> str:
    low, high = found["ci"]
    text = f"{found['mean']:+.4g} ({low:+.4g} to {high:+.4g})"
    return f"**{text}**" if low > 0 or high < 0 else text


def basis_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers rest on, a line a model: prompts, seeds, weights of the scorers."""
    lines = ["## What it rests on", ""]
    for row in rows:
        scorers = row.get("scorers", {})
        weights = ", ".join(f"{name} `{digest}`" for name, digest in scorers.get("weights_xxh3", {}).items())
        facts = [
            f"{row.get('count')} prompts",
            f"{row.get('samples_per_prompt', 1)} images each",
            f"seed {row.get('seed')}",
        ]
        if scorers.get("reference"):
            facts.append(f"reference {escaped(scorers['reference'])} ({scorers['reference_count']} images)")
        if scorers.get("magic_prompt"):
            facts.append(f"HPS with {escaped(repr(scorers['magic_prompt']))} before each prompt")
        lines.append(
            f"- {escaped(row['model'])}: {', '.join(facts)}" + (f"; weights (xxh3): {weights}" if weights else "")
        )
    return lines
