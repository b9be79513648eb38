"""What every family loads in the same way: parts of a pipeline folder, with one line where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from train_t2i.errors import UserError

# what loaders raise
ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)


@contextmanager
def told(source: str, flag: str, takes: str = "a hub id or a diffusers pipeline folder") -> Iterator[None]:
    """Turns the loaders' many exceptions into one line that names the flag, what was given and what it ``takes``."""
    try:
        yield
    except ERRORS as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if "meta tensor" in first_line:  # what diffusers leaves where a file has no weight
            first_line = "some of its weights are missing"
        raise UserError(f"{flag} {source}: cannot be loaded ({first_line})", f"give {takes}") from error


def load_pipeline(kind: Any, model: str, dtype: torch.dtype, without: tuple[str, ...], **options: Any) -> Any:
    """A pipeline of class ``kind`` but the parts named in ``without``, silent."""
    with told(model, "--pretrained-model"):
        absent: dict[str, Any] = dict.fromkeys(without)
        pipe = kind.from_pretrained(model, dtype=dtype, **absent, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def load_part(kind: Any, source: str, flag: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of class ``kind`` from its own folder or a hub id."""
    if Path(source).is_file():
        raise UserError(f"{flag} {source}: is a file", "give the folder with its config.json, or a hub id")
    with told(source, flag, "a folder with its config.json, or a hub id"):
        return kind.from_pretrained(source, dtype=dtype)
