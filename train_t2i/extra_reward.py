"""A reward of the user's own: a function of images and prompts, named as MODULE:FUNCTION."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from train_t2i.errors import UserError


@dataclass(frozen=True)
class ExtraReward:
    """``function(images, prompts)``, (B, 3, H, W) in [0, 1] and B prompts -> (B,); its gradient reaches the pixels."""

    spec: str
    function: Callable[[Tensor, Sequence[str]], Tensor]

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        try:
            scores = self.function(images, prompts)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"--extra-reward {self.spec}: {type(error).__name__}: {error}") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"--extra-reward {self.spec}: returned {shape}", "it returns one score an image, (B,)")
        if torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:
            raise UserError(
                f"--extra-reward {self.spec}: no gradient reaches the pixels",
                "compute it with torch, without detaching",
            )
        return scores.float()


def load_extra(spec: str) -> ExtraReward:
    """Raises UserError where there is no such function."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise UserError(f"--extra-reward {spec}: not MODULE:FUNCTION", "e.g. mypackage.rewards:contrast")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--extra-reward {spec}: {error}", "run from the folder that holds the module") from None
    if not callable(found):
        raise UserError(f"--extra-reward {spec}: not a function")
    return ExtraReward(spec, found)
