"""The rows of an image table: a target, a prompt, and for edits the sources that they start from.

A table (csv, tsv, jsonl, json, parquet) has the columns ``image`` or ``file_path``, a prompt's (``PROMPT_COLUMNS``), and may
have ``source_file_path`` (a path, a list of them, or in one cell a JSON list or paths between semicolons) and ``type``.
Everything is looked at once, before anything trains; a row that cannot be used stops the run or is left out by the rules.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from train_t2i.errors import UserError
from train_t2i.pictures import header_size, quiet
from train_t2i.sizes import Size, SourceSizes, source_sizes
from train_t2i.tables import PROMPT_COLUMNS, READERS, clean, place_of, prompt_of, records, short

IMAGE_COLUMNS = ("image", "file_path")
SOURCES, TYPE = "source_file_path", "type"
HEADER_READERS = 16  # threads: on a network disk each header is a wait
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an image table."""

    table: Path
    number: int
    image: Path | None  # the target; None where rows need none
    prompt: str
    sources: tuple[Path, ...] = ()
    image_px: Size = (0, 0)  # where headers are read
    sources_px: tuple[SourceSizes, ...] = ()

    @property
    def place(self) -> str:
        """Where a person finds it: FILE:LINE or FILE, row N."""
        return place_of(self.table, self.number)

    @property
    def target(self) -> Path:
        if self.image is None:
            raise ValueError("a row without a target")
        return self.image


@dataclass(frozen=True)
class RowRules:
    """What is asked of every row."""

    root: str | None = None  # where relative paths begin; None: the table's folder; empty: paths are taken as written
    targets: bool = True
    sources: tuple[int, int] | None = None  # the fewest and the most of a row; None: the column is not looked at
    source_sides_px: tuple[int, int | None] = (1024, None)  # of both readers, see ``source_sizes``
    headers: bool = False  # images are opened and measured; sources always are


class Rejects:
    """Rows that cannot be used: told in a file, and too many of them stop the run."""

    def __init__(self, file: Path, max_fraction: float, *, writes: bool = True) -> None:
        """``writes``: of several processes, one."""
        self.file, self.max_fraction, self.writes = file, max_fraction, writes
        self.bad: list[tuple[int, UserError]] = []

    def settle(self, table: Path, total: int) -> str:
        """What was left out, in a line, or nothing.  Raises UserError above the limit."""
        self.bad.sort(key=lambda each: each[0])
        if self.writes:
            self._write(table)
        if not self.bad:
            return ""
        told = f"{len(self.bad)} bad rows of {total}, listed in {self.file}"
        if len(self.bad) > self.max_fraction * total:
            first = self.bad[0][1]
            way_out = "or leave such rows out: --max-bad-fraction"
            raise UserError(
                f"{first.message}; the first of {told}", f"{first.hint}, {way_out}" if first.hint else way_out
            )
        return f"{table}: left out {told}"

    def _write(self, table: Path) -> None:
        if not self.bad:
            self.file.unlink(missing_ok=True)  # of an earlier start
            return
        records = (
            {"row": number, "place": place_of(table, number), "reason": error.message} for number, error in self.bad
        )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def load_rows(path: str | os.PathLike[str], rules: RowRules | None = None, rejects: Rejects | None = None) -> list[Row]:
    """The rows of a table that can be used.

    Image paths stay inside the root.  Every file is there; without ``rejects`` the first bad row is an error, with them
    they are collected and wait for ``Rejects.settle``.  Raises UserError.
    """
    path, rules = Path(path), rules or RowRules()
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is not a table", f"give one of {', '.join(READERS)} with the columns image and prompt")
    resolve, rows = _Root(path, rules.root), []
    wanted = (*IMAGE_COLUMNS, *PROMPT_COLUMNS, SOURCES, TYPE)
    for number, record in records(path, wanted):
        try:
            rows.append(_row(path, number, record, rules, resolve))
        except UserError as error:
            _bad(rejects, number, error)
    if rules.headers or (rules.sources or (0, 0))[1]:
        rows = list(_measured(rows, rules, rejects))
    if not rows and not (rejects and rejects.bad):
        raise UserError(f"{path} holds no row")
    log.info("%s: %d rows, %d of them with a blank prompt", path, len(rows), sum(not row.prompt for row in rows))
    return rows


def _bad(rejects: Rejects | None, number: int, error: UserError) -> None:
    if rejects is None:
        raise error
    rejects.bad.append((number, error))


def in_words(least: int, most: int) -> str:
    """How many sources a model takes."""
    return "none" if most == 0 else f"{most}" if least == most else f"{least} to {most}"


def _row(table: Path, number: int, record: Mapping[str, Any], rules: RowRules, resolve: _Root) -> Row:
    kind = clean(record.get(TYPE), TYPE, table, number)
    if kind not in ("", "image"):
        raise UserError(
            f"{place_of(table, number)}: type is {short(kind)}; image models train on images", "drop the row"
        )
    prompt = prompt_of(record, table, number)
    sources = _source_names(record.get(SOURCES), table, number) if rules.sources else []
    if rules.sources and not rules.sources[0] <= len(sources) <= rules.sources[1]:
        raise UserError(
            f"{place_of(table, number)}: {len(sources)} sources in {SOURCES}, the model takes {in_words(*rules.sources)}",
            "name them there, or choose another --model-family",
        )
    image = None
    if rules.targets:
        column = next((column for column in IMAGE_COLUMNS if column in record), IMAGE_COLUMNS[0])
        if not (name := clean(record.get(column), column, table, number)):
            raise UserError(
                f"{place_of(table, number)}: no image",
                f"the column {' or '.join(IMAGE_COLUMNS)} holds its path beside the table",
            )
        image = resolve(name, number)
    return Row(table, number, image, prompt, tuple(resolve(name, number) for name in sources))


def _source_names(cell: object, table: Path, number: int) -> list[str]:
    """The paths in a cell: a list, a JSON list as text, or text with semicolons between them."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place_of(table, number)}: {SOURCES} is not a JSON list: {short(str(error))}",
                "or put ; between paths",
            ) from None
    if isinstance(cell, list):
        names = [clean(name, SOURCES, table, number) for name in cell]
        if not all(names):
            raise UserError(f"{place_of(table, number)}: a blank path in {SOURCES}", "drop it")
        return names
    return [name.strip() for name in clean(cell, SOURCES, table, number).split(";") if name.strip()]


def _measured(rows: list[Row], rules: RowRules, rejects: Rejects | None) -> Iterator[Row]:
    """Rows with the sizes of their images, in their order."""

    def measure(row: Row) -> Row | UserError:
        try:
            target = (0, 0) if row.image is None else header_size(row.image, row.place)
            return replace(
                row, image_px=target, sources_px=tuple(_sizes(row, path, rules.source_sides_px) for path in row.sources)
            )
        except UserError as error:
            return error

    with quiet(), ThreadPool(HEADER_READERS) as pool:
        for row, found in zip(rows, pool.imap(measure, rows, chunksize=16), strict=True):
            if isinstance(found, UserError):
                _bad(rejects, row.number, found)
            else:
                yield found


def _sizes(row: Row, path: Path, sides_px: tuple[int, int | None]) -> SourceSizes:
    try:
        return source_sizes(*header_size(path, row.place), *sides_px)
    except ValueError as error:
        raise UserError(f"{row.place}: image {path.name}: {error}", "replace it or drop the row") from None


class _Root:
    """Image paths of one table: relative to a root, and inside it even when links are followed."""

    def __init__(self, table: Path, root: str | None) -> None:
        self.table, self.as_written = table, root == ""
        self.root = os.path.realpath(root if root is not None else table.parent)
        self._folders: dict[str, str] = {}  # links of a folder are looked up once

    def __call__(self, name: str, number: int) -> Path:
        full = name if self.as_written else self._inside(name, number)
        if not os.path.isfile(full):  # noqa: PTH113
            looked = "paths are taken as written" if self.as_written else f"looked in {self.root}"
            raise UserError(f"{place_of(self.table, number)}: no image {short(name)}", looked)
        return Path(full)

    def _inside(self, name: str, number: int) -> str:
        folder, file = os.path.split(os.path.join(self.root, name))  # noqa: PTH118 - pathlib is slow for millions
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        full = os.path.join(self._folders[folder], file)  # noqa: PTH118
        if os.path.islink(full) or file in ("", ".", ".."):  # noqa: PTH114
            full = os.path.realpath(full)
        if not full.startswith(self.root.rstrip(os.sep) + os.sep):
            raise UserError(
                f"{place_of(self.table, number)}: image {short(name)} is outside {self.root}",
                "name the images' folder with --train-data-dir, and keep them in it, not links to them",
            )
        return full
