"""Learning rates as pure functions of the step: the schedules of ``diffusers.optimization``, and how many steps epochs are.

One departure: in a warm-up of W steps the rate of step s is (s + 1) / W of the whole.  diffusers takes s / W, whose first
update has a rate of 0 and moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

LOWEST = 1e-7  # where diffusers' polynomial ends: its ``get_scheduler`` takes no other


def _cosine_with_restarts(progress: float, num_cycles: int) -> float:
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((num_cycles * progress) % 1.0)))


# name -> (progress in [0, 1], whole rate, cycles, power) -> share of the whole
DECAYS: dict[str, Callable[[float, float, int, float], float]] = {
    "linear": lambda progress, base, num_cycles, power: 1 - progress,
    "cosine": lambda progress, base, num_cycles, power: 0.5 * (1 + math.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, base, num_cycles, power: _cosine_with_restarts(progress, num_cycles),
    "polynomial": lambda progress, base, num_cycles, power: ((base - LOWEST) * (1 - progress) ** power + LOWEST) / base,
}
SCHEDULERS = ("constant", "constant_with_warmup", *DECAYS)


def rate(
    base: float, step: int, total: int, scheduler: str, warmup: int = 0, num_cycles: int = 1, power: float = 1.0
) -> float:
    """The rate of a step, counted from 0, of ``total``: a rise to ``base``, then constant or down to the end at ``total``.

    Neither the number of processes nor accumulation is asked for: a step is an update, however many rows are in it.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if scheduler not in DECAYS or base == 0:
        return base
    progress = min((step - warmup) / max(1, total - warmup), 1.0)
    return base * DECAYS[scheduler](progress, base, num_cycles, power)


def steps_of(num_epochs: int, rows: int, global_batch: int) -> int:
    """The steps of so many passes over the data; a last batch that is not full is filled with the next pass's first rows."""
    return num_epochs * math.ceil(rows / global_batch)
