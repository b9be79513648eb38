"""Muon for matrices and convolutions, AdamW for the rest: fewer steps for the same loss, and steps are what a CPU is short of.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): momentum, made orthogonal by five
Newton-Schulz iterations, scaled by sqrt(max(1, rows / columns)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def orthogonal(m: Tensor, iterations: int = 5) -> Tensor:
    """(..., R, C) -> nearly U V^T of its singular value decomposition U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`lr` is that of the AdamW part; matrices move at `lr * ratio`."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, ratio: float = 4.0, weight_decay: float = 1e-4) -> None:
        super().__init__(parameters, {"lr": lr, "ratio": ratio, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["first"], state["second"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                move = self._matrix(p, state) * group["ratio"] if _is_matrix(p) else self._adam(p, state)
                p.sub_(move, alpha=group["lr"])

    @staticmethod
    def _matrix(p: Tensor, state: dict) -> Tensor:
        assert p.grad is not None
        state["first"].lerp_(p.grad, 0.05)
        ahead = p.grad.lerp(state["first"], 0.95).flatten(1)
        return (orthogonal(ahead) * max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5).view_as(p)

    @staticmethod
    def _adam(p: Tensor, state: dict) -> Tensor:
        assert p.grad is not None
        state["first"].lerp_(p.grad, 0.1)
        state["second"].lerp_(p.grad.square(), 0.01)
        first = state["first"] / (1 - 0.9 ** state["step"])
        second = state["second"] / (1 - 0.99 ** state["step"])
        return first / (second.sqrt() + 1e-8)


def _is_matrix(p: Tensor) -> bool:
    big = p.ndim >= 2 and min(p.shape[0], p.flatten(1).shape[1]) >= 8
    return big and not getattr(p, "is_table", False)


def mark_tables(module: nn.Module) -> None:
    """Leave lookup tables (words, places) to AdamW: their rows are apart, and most have no gradient at a step."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.weight.is_table = True  # type: ignore[attr-defined]
    for name, parameter in module.named_parameters():
        if any(word in name for word in ("position", "class_embedding", "place")):
            parameter.is_table = True  # type: ignore[attr-defined]
