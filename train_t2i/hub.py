"""Prompts of a dataset of the Hugging Face hub, through the package ``datasets``, which is an optional part.

``datasets`` keeps what it downloads (HF_HOME), memory-mapped, so a second start needs no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i import redact
from train_t2i.errors import UserError
from train_t2i.tables import PROMPT_COLUMNS, clean, short

PREFIX = "hub:"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
INSTALL = 'install it: uv sync --extra datasets, or pip install "datasets>=4"'
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Dataset:
    """``hub:ORG/NAME[:SPLIT][:COLUMN]``; NAME may be a local folder in the layout of the hub."""

    name: str
    split: str = "train"
    column: str | None = None  # the first of PROMPT_COLUMNS that there is

    @staticmethod
    def parse(text: str) -> Dataset:
        """Raises UserError."""
        name, *rest = text.removeprefix(PREFIX).split(":")
        if not name or len(rest) > 2 or not all(rest):
            raise UserError(f"{text}: not the name of a hub dataset", "write hub:ORG/NAME[:SPLIT][:COLUMN]")
        return Dataset(name, *rest)

    def __str__(self) -> str:
        return PREFIX + ":".join(filter(None, (self.name, self.split, self.column)))


def looks_like_one(text: str) -> bool:
    """ORG/NAME, perhaps with a split and a column, where no folder ORG is here."""
    name = text.split(":")[0]
    there = os.path.exists(os.path.dirname(name))  # noqa: PTH110, PTH120 - pathlib raises where a name is too long
    return bool(NAME.fullmatch(name)) and not Path(name).suffix and not there


def prompts(dataset: Dataset) -> Iterator[str]:
    """Every row's prompt, blank ones included.  Raises UserError."""
    rows = _load(dataset)
    names = list(rows.column_names)
    wanted = (dataset.column,) if dataset.column else PROMPT_COLUMNS
    if not (found := [name for name in wanted if name in names]):
        raise UserError(
            f"{dataset}: no column {', '.join(wanted)}; it has: {short(', '.join(names))}",
            f"name one: hub:{dataset.name}:{dataset.split}:COLUMN",
        )
    number, place = 0, Path(str(dataset))
    for batch in rows.select_columns(found[:1]).iter(ROWS_AT_ONCE):
        for value in batch[found[0]]:
            number += 1
            yield clean(value, found[0], place, number)


def _load(dataset: Dataset) -> Any:
    """The rows, memory-mapped."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{dataset}: hub datasets need the package datasets, which is not installed", INSTALL) from None
    try:
        return datasets.load_dataset(dataset.name, split=dataset.split)
    except Exception as error:  # whatever the hub, the network or a stranger's files make it raise
        first = (redact.clean(str(error)).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{dataset}: cannot be loaded ({type(error).__name__}: {short(first)})",
            "check its name and the network; for a local file, check the path",
        ) from None
