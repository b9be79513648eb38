"""One training step on several cores: each thread takes part of the batch through forward and backward, with one thread inside.

Threads within an operator hardly help networks as small as these (measured: two are slower than one), threads beside each other do.
The gradients are added in a fixed order, so results do not depend on timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from shapes.muon import Muon
from shapes.world import cosine, set_lr

Part = TypeVar("Part")
WORKERS = 2  # also the number of parts, whatever the machine has: the result must not depend on it
_pool = ThreadPoolExecutor(WORKERS)


def backward(loss: Callable[[Part], Tensor], parts: Sequence[Part], parameters: Sequence[Tensor]) -> float:
    """Set every parameter's gradient to that of the mean of `loss` over `parts`.  Returns that mean."""

    def one(part: Part) -> tuple[float, tuple[Tensor | None, ...]]:
        torch.set_num_threads(1)
        with torch.enable_grad():
            value = loss(part)
            return float(value.detach()), torch.autograd.grad(value, parameters, allow_unused=True)

    done = list(_pool.map(one, parts))
    for i, parameter in enumerate(parameters):
        found = [grad for _, grads in done if (grad := grads[i]) is not None]
        parameter.grad = sum(found[1:], found[0]) / len(parts) if found else None
    return sum(value for value, _ in done) / len(done)


def fit(
    name: str,
    loss: Callable[[Part], Tensor],
    parts: Callable[[int], Sequence[Part]],
    parameters: Sequence[Tensor],
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
) -> None:
    """Minimise `loss` over the parts of each step with Muon and a cosine; prints progress."""
    optimizer = Muon(parameters, learning_rate, weight_decay=weight_decay)
    torch.set_num_threads(1)
    start = time.monotonic()
    mean = 0.0
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, learning_rate))
        value = backward(loss, parts(step), parameters)
        mean = value if step == 0 else 0.98 * mean + 0.02 * value
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 99 or step in (0, steps - 1):
            seconds = time.monotonic() - start
            print(f"{name} {step + 1}/{steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
