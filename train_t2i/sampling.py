"""Samplers over a clean-estimate callable.  A graph is built iff the callable's role is being updated.

Shapes: x is (B, C, H, W); grid is (N + 1,) fp32 descending to 0; ``x0_at(x_t, t) -> x0`` with t (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from train_t2i.schedule import Path, per_row

X0At = Callable[[Tensor, Tensor], Tensor]
NEAR = 1e-4  # times that are nearer to one another than this are one


def rows_at(time: Tensor, like: Tensor) -> Tensor:
    """A 0-dim time -> (B,) on ``like``'s device."""
    return time.to(like.device, torch.float32, non_blocking=True).expand(len(like))


def few_step(x0_at: X0At, path: Path, grid: Tensor, noise: Tensor, renoise: Callable[[int], Tensor] | None) -> Tensor:
    """The student's sample: at each grid time estimate x0, then go to the next; (B, C, H, W).

    ``renoise(i)`` gives the fresh noise that leads to grid time i (consistency-style sampling, as DMD2 and LCM); None
    follows the deterministic path.
    """
    return trajectory(x0_at, path, grid, noise, renoise)[-1]


def trajectory(
    x0_at: X0At,
    path: Path,
    grid: Tensor,
    noise: Tensor,
    renoise: Callable[[int], Tensor] | None,
    *,
    backprop_steps: int = 0,
    recompute: bool = False,
) -> list[Tensor]:
    """``few_step`` with all that it passes through: the states (B, C, H, W) after each of its N steps.

    A grid (B, N + 1) gives each row its own times: a row whose next time is 0 stays there.  The gradient goes back through
    the last ``backprop_steps`` steps of each row (0: all).  ``recompute`` keeps only the states for backward, which then
    makes the calls of one step at a time anew.
    """
    num_steps, states = grid.shape[-1] - 1, []
    own = (grid[..., :-1] > 0).sum(-1)  # steps of each row
    first = int(own.min()) - backprop_steps if backprop_steps else 0  # the first step that a gradient goes back through
    cut = (own - backprop_steps).to(noise.device, non_blocking=True)
    grid = grid.to(noise.device, torch.float32, non_blocking=True)

    def advance(x: Tensor, i: int, fresh: Tensor | None) -> Tensor:
        t, s = (grid[..., j].expand(len(x)) for j in (i, i + 1))
        if grid.ndim == 1:
            return path.step(x, x0_at(x, t), t, s, fresh)
        there, asked = t > 0, torch.where(t > 0, t, grid[:, 0])  # a row that is done is asked, and not heard
        return torch.where(per_row(there, x), path.step(x, x0_at(x, asked), asked, s, fresh), x)

    x = noise
    for i in range(num_steps):
        fresh = renoise(i + 1) if renoise is not None and i + 1 < num_steps else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
            x = checkpoint(advance, x, i, fresh, use_reentrant=False) if recompute else advance(x, i, fresh)
        if backprop_steps and grid.ndim == 2:
            x = torch.where(per_row((i < cut).expand(len(x)), x), x.detach(), x)
        states.append(x)
    return states


def simulate_to(
    x0_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    path: Path,
    grid: Tensor,
    noise: Tensor,
    renoise: Callable[[int], Tensor],
    level: Tensor,
    *,
    whole: bool = False,
    least_rows: int = 1,
) -> Tensor:
    """Backward simulation (DMD2 section 4.4): run the student as at inference; (B, C, H, W) fp32.

    Row b is the clean estimate that the student made at its own grid time ``level[b]`` (B,) int64, on the host; a row that
    has it takes part in no further call.  Level -1 wants none: zeros.
    ``x0_of(x, t, rows)``: the estimate for some ``rows`` (n,) int64 of the batch.
    The run stops at the largest level drawn: max(level) + 1 network calls; ``whole`` makes all, whatever was drawn.
    No call has fewer than ``least_rows``, if the batch has them: rows that are done fill it up, and are not heard.
    """
    order = level.argsort(descending=True, stable=True)  # those that go on longest come first
    num_calls = len(grid) - 1 if whole else int(level.max()) + 1
    # of how many rows an estimate is made at each time; the host decides, so nothing waits for the device
    going = [int((level >= i).sum()) for i in range(num_calls)] + [0]
    order = order.to(noise.device, non_blocking=True)
    x, found = noise[order], []
    for i in range(num_calls):
        rows = order[: max(going[i], least_rows)]  # a call that other processes make too has a row at least
        x = x[: len(rows)]
        x0 = x0_of(x, rows_at(grid[i], x), rows).float()
        found.append(x0[going[i + 1] : going[i]])
        if i < num_calls - 1:
            x = path.step(x, x0, rows_at(grid[i], x), rows_at(grid[i + 1], x), renoise(i + 1)[rows])
    kept = torch.zeros_like(noise, dtype=torch.float32)
    if found:
        kept[order[: going[0]]] = torch.cat(found[::-1])
    return kept


def many_step(x0_at: X0At, path: Path, num_steps: int, noise: Tensor) -> Tensor:
    """The teacher's sample: the deterministic path from pure noise in ``num_steps`` steps; (B, C, H, W)."""
    return trajectory(x0_at, path, path.dense_grid(num_steps), noise, None)[-1]


def many_step_through(x0_at: X0At, path: Path, num_steps: int, noise: Tensor, grid: Tensor) -> list[Tensor]:
    """The same, by way of a student's times: where the teacher is (B, C, H, W) at each of ``grid`` (N + 1,) but the first.

    The student's times take the place of those of the teacher's that they nearly are, and are added where none is near.
    """
    dense = path.dense_grid(num_steps)
    apart = (dense[:, None] - grid[None]).abs().amin(dim=1) > NEAR
    times = torch.cat([dense[apart], grid]).sort(descending=True).values
    states = trajectory(x0_at, path, times, noise, None)
    at = [int((times == time).nonzero()[0]) - 1 for time in grid[1:]]  # the state after step i is at time i + 1
    return [states[i] for i in at]
