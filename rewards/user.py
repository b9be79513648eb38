"""A function of the user's own as a reward: ``module:function``.

The function takes images (B, 3, H, W) in [0, 1] and a list of B prompts, and returns (B,) scores, higher is better.  It
brings its own weights.  Whether it is differentiable shows when gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from rewards.base import OFFICIAL, Choices, RewardError, WeightsReport, check_rows


class UserReward:
    """Holds a function to what a reward promises."""

    differentiable = True

    def __init__(self, name: str, function: Callable[[Tensor, list[str]], Tensor], device: torch.device) -> None:
        self.name = name
        self.function = function
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32.  RewardError where the function fails or returns something else."""
        check_rows(self.name, images, prompts)
        try:
            scores = self.function(images.to(self.device), list(prompts))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RewardError(self.name, f"failed ({type(error).__name__}: {error})", "correct the function") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise RewardError(
                self.name, f"returned {found} for {len(prompts)} images", "return a tensor of one score each"
            )
        if images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise RewardError(
                self.name, "returned scores without a gradient", "keep to differentiable operations on images"
            )
        return scores.float()


def build(
    spec: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
    choices: Choices = OFFICIAL,
) -> UserReward:
    """``module:function`` -> the reward.  Its precision and its memory are its own affair.  Raises RewardError."""
    inspect(spec, choices)
    return UserReward(spec, load_function(spec), torch.device(device))


def inspect(spec: str, choices: Choices = OFFICIAL) -> WeightsReport:
    """Whether the function is there.  Raises RewardError."""
    choices.refuse(spec, "a function", "antialias", "resize_mode", "quick_gelu", "logit_scale")
    load_function(spec)
    return WeightsReport(spec, "function", 0, 0, (0, 0), {"score": "of the user's own"})


def load_function(spec: str) -> Callable[[Tensor, list[str]], Tensor]:
    """Imports it.  Raises RewardError."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise RewardError(spec, "is not module:function", "e.g. my_rewards:brightness")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever importing a user's module raises
        reason = f"cannot be imported ({type(error).__name__}: {error})"
        raise RewardError(spec, reason, "run from the folder that holds the module") from None
    if not callable(found):
        raise RewardError(spec, "is not a function", "name one that takes images and prompts")
    return found
