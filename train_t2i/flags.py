"""One setting as a field of a dataclass: its default, its help, its bounds, and what a change means when a run goes on."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Resume = Literal["fatal", "warn", "free"]


def flag(
    default: Any,
    help: str,
    *,
    resume: Resume = "fatal",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
) -> Any:
    """A config field with its flag's help and its bounds: low <= value <= high, above < value < below.

    ``words``: what a switch may be besides on and off; ``parts``: what it may be on for alone, joined by +.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    taken = {"help": help, "resume": resume, "words": words, "parts": parts}
    return dataclasses.field(default=default, metadata=taken | limits)
