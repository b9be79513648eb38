"""The optimizer of a role and its fp16 loss scale."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train_t2i.errors import UserError

FACTOR = "rate_factor"  # of a group of parameters


@dataclass(frozen=True)
class AdamSettings:
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    use_8bit: bool
    factors: Mapping[str, float] = field(default_factory=dict)  # expression for a parameter's name -> of its rate
    offload: bool = False  # its state waits in the host's memory, where that is not the device's (offload.py)

    def factor(self, name: str) -> float:
        """What a parameter's learning rate is multiplied by."""
        return next((factor for pattern, factor in self.factors.items() if re.search(pattern, name)), 1.0)


def make_adam(named: Mapping[str, nn.Parameter], adam: AdamSettings) -> torch.optim.Optimizer:
    """AdamW on the tensors that this process updates, by the names of their parameters; a group for each factor."""
    factors = {name: adam.factor(name) for name in named}
    groups = [
        {"params": [tensor for name, tensor in named.items() if factors[name] == factor], FACTOR: factor}
        for factor in sorted(set(factors.values()), reverse=True)
    ]
    options: dict[str, Any] = {
        "lr": adam.learning_rate, "betas": adam.betas, "eps": adam.epsilon, "weight_decay": adam.weight_decay,
    }  # fmt: skip
    if not adam.use_8bit:
        return torch.optim.AdamW(groups, fused=True, **options)  # one pass over memory; on CPUs too
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--use-8bit-adam needs bitsandbytes", "uv sync --extra bitsandbytes") from None
    return AdamW8bit(groups, **options)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[FACTOR]


def create_state(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Let an optimizer that has made no step make its state: a step of rate 0 on gradients of 0 moves nothing."""
    before = [(group["lr"], group["eps"], group["params"]) for group in optimizer.param_groups]
    for i, group in enumerate(optimizer.param_groups):
        group["lr"], group["eps"] = 0.0, 1.0
        group["params"] = list(tensors) if i == 0 else []
    gradients = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    for group, (rate, epsilon, params) in zip(optimizer.param_groups, before, strict=True):
        group["lr"], group["eps"], group["params"] = rate, epsilon, params


@dataclass
class LossScale:
    """torch.amp.GradScaler's rule on the vote of all processes: an overflow on one halves the scale on all."""

    scale: float = 1.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    growth_tracker: int = 0
    enabled: bool = False

    @staticmethod
    def of(dtype: torch.dtype) -> LossScale:
        return LossScale(scale=65536.0, enabled=True) if dtype == torch.float16 else LossScale()

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        if overflow:
            self.scale, self.growth_tracker = self.scale * self.backoff_factor, 0
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            self.scale, self.growth_tracker = self.scale * self.growth_factor, 0

    def state(self) -> dict[str, Any]:
        """In GradScaler's words; nothing where there is no scale."""
        if not self.enabled:
            return {}
        words = ("scale", "growth_factor", "backoff_factor", "growth_interval")
        return {word: getattr(self, word) for word in words} | {"_growth_tracker": self.growth_tracker}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to load where the checkpoint was not made in fp16."""
        if self.enabled and state:
            self.scale, self.growth_tracker = float(state["scale"]), int(state["_growth_tracker"])
