"""Samplers over a clean-estimate callable.  A graph is built iff the callable's role is being updated.

Shapes: x is (B, C, H, W); grid is (N + 1,) fp32 descending to 0; ``x0_at(x_t, t) -> x0`` with t (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train_t2i.schedule import Path, per_row

X0At = Callable[[Tensor, Tensor], Tensor]


def rows_at(time: Tensor, like: Tensor) -> Tensor:
    """A 0-dim time -> (B,) on ``like``'s device."""
    return time.to(like.device, torch.float32).expand(len(like))


def few_step(x0_at: X0At, path: Path, grid: Tensor, noise: Tensor, renoise: Callable[[int], Tensor] | None) -> Tensor:
    """The student's sample: at each grid time estimate x0, then go to the next; (B, C, H, W).

    ``renoise(i)`` gives the fresh noise that leads to grid time i (consistency-style sampling, as DMD2 and LCM); None
    follows the deterministic path.
    """
    x, num_steps = noise, len(grid) - 1
    for i in range(num_steps):
        x0 = x0_at(x, rows_at(grid[i], x))
        fresh = renoise(i + 1) if renoise is not None and i + 1 < num_steps else None
        x = path.step(x, x0, rows_at(grid[i], x), rows_at(grid[i + 1], x), fresh)
    return x


def simulate_to(
    x0_at: X0At,
    path: Path,
    grid: Tensor,
    noise: Tensor,
    renoise: Callable[[int], Tensor],
    level: Tensor,
    *,
    whole: bool = False,
) -> Tensor:
    """Backward simulation (DMD2 section 4.4): run the student as at inference; (B, C, H, W) fp32.

    Row b is the clean estimate that the student made at its own grid time ``level[b]`` (B,) int64.  The run stops at the
    largest level drawn: max(level) + 1 network calls; ``whole`` makes all, whatever was drawn.
    """
    last = (
        len(grid) - 2 if whole else int(level.max())
    )  # read once, before the levels move: a comparison on the device would wait for it
    level = level.to(noise.device)
    kept = torch.empty_like(noise, dtype=torch.float32)
    x = noise
    for i in range(last + 1):
        x0 = x0_at(x, rows_at(grid[i], x)).float()
        kept = torch.where(per_row(level == i, x0), x0, kept)
        if i < last:
            x = path.step(x, x0, rows_at(grid[i], x), rows_at(grid[i + 1], x), renoise(i + 1))
    return kept


def many_step(x0_at: X0At, path: Path, num_steps: int, noise: Tensor) -> Tensor:
    """The teacher's sample: the deterministic path from pure noise in ``num_steps`` steps; (B, C, H, W)."""
    grid = path.dense_grid(num_steps)
    x = noise
    for i in range(num_steps):
        x0 = x0_at(x, rows_at(grid[i], x))
        x = path.step(x, x0, rows_at(grid[i], x), rows_at(grid[i + 1], x))
    return x
