"""Scores with the memory of a few rows at a time.

A row's score depends on its own image alone, so its gradient is known as soon as it is computed: what is kept for the
backward pass is one gradient the size of the rows, in place of the activations of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewards.base import Reward

SCALE = 1024.0  # of gradients on their way: a power of two, exact; keeps those of pixels out of fp16's subnormals


def by_parts(rows: Tensor, score: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
    """(B, ...) -> (B,): ``score(part, index of its first row)`` of ``size`` rows at a time.

    Exact where each score depends on its own row alone and on nothing else that is trained.  Gradients reach ``rows``, once.
    """
    if len(rows) <= size:
        return score(rows, 0)
    return _Parts.apply(rows, score, size)


class MicroBatched:
    """A reward that is called on ``size`` images at a time.  Scores and gradients are those of the reward it holds."""

    def __init__(self, reward: Reward, size: int) -> None:
        if size < 1:
            raise ValueError(f"a micro-batch has one image at least, not {size}")
        self.reward = reward
        self.size = size
        self.name = reward.name
        self.differentiable = reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32.  Gradients reach ``images``, once."""
        if len(images) != len(prompts):
            return self.reward(images, prompts, tick=tick)  # which refuses them

        def score(part: Tensor, first: int) -> Tensor:
            return self.reward(part, prompts[first : first + self.size], tick=tick)

        return by_parts(images, score, self.size)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, score: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
        scores: list[Tensor] = []
        gradients: list[Tensor] = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                found = score(part, first)
            scores.append(found.detach())
            if found.requires_grad:
                gradients += torch.autograd.grad(found, part, torch.full_like(found, SCALE))
            del found
        ctx.save_for_backward(*gradients)
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.saved_tensors:  # nothing of it is followed
            return None, None, None
        gradient = torch.cat(ctx.saved_tensors)
        weights = incoming.to(gradient) / SCALE
        return gradient * weights.reshape(-1, *[1] * (gradient.dim() - 1)), None, None
