"""Scores with the memory of a few images at a time.

A row's score depends on its own image alone, so its gradient is known as soon as it is computed: what is kept for the
backward pass is one gradient the size of the images, in place of the activations of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewards.base import Reward


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

        def score(part: Tensor, first: int) -> Tensor:
            return self.reward(part, prompts[first : first + self.size], tick=tick)

        if len(images) <= self.size or len(images) != len(prompts):  # which the reward itself refuses
            return self.reward(images, prompts, tick=tick)
        return _Scores.apply(images, score, self.size)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, score: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
        scores: list[Tensor] = []
        gradients: list[Tensor] = []
        for first in range(0, len(images), size):
            part = images[first : first + size].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                found = score(part, first)
            scores.append(found.detach())
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(found, part, torch.ones_like(found))
        ctx.save_for_backward(*gradients)
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        gradient = torch.cat(ctx.saved_tensors)
        return gradient * incoming.to(gradient)[:, None, None, None], None, None
