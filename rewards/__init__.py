"""Reward models: ``(images, prompts) -> scores``, each with its own differentiable preprocessing and frozen weights.

Importing this costs nothing; a reward's own file, and torch with it, is imported when it is inspected or built.  Adding
one is a file with ``build`` and ``inspect``, a line here, and a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rewards.base import Reward, RewardError, WeightsReport

if TYPE_CHECKING:
    import torch

__all__ = ["REWARDS", "Builder", "Reward", "RewardError", "WeightsReport", "inspect_weights"]


@dataclass(frozen=True)
class Builder:
    """A reward not imported yet."""

    module: str

    def __call__(
        self,
        weights: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        checkpointing: bool = False,
    ) -> Reward:
        """Loads the reward's weights, a file or a folder.  ``dtype`` None is fp32.  Raises RewardError."""
        options: dict[str, Any] = {"device": device, "checkpointing": checkpointing}
        if dtype is not None:
            options["dtype"] = dtype
        return cast(Reward, import_module(self.module).build(weights, **options))

    def inspect(self, weights: str | Path) -> WeightsReport:
        """Whether a call would find what it needs, without building.  Raises RewardError."""
        return cast(WeightsReport, import_module(self.module).inspect(weights))


REWARDS = {
    "clip": Builder("rewards.clip"),
    "hpsv2": Builder("rewards.hpsv2"),
}


def inspect_weights(name: str, weights: str | Path) -> WeightsReport:
    """Checks a reward's weights at the start of a run: the files, the header, every name and shape.

    Seconds at most, and no allocation to speak of, also for towers of a billion parameters.  Raises RewardError.
    """
    return REWARDS[name].inspect(weights)
