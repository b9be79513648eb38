"""What a reward is, and the one error it raises.  Light on purpose: torch is imported by type checkers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

ResizeMode = Literal["squash", "longest", "shortest"]


class RewardError(ValueError):
    """A reward that cannot be built from what it was given: one line that names the file and the way out.

    ``path`` is the file or folder at fault, ``reason`` says what is wrong with it, ``hint`` what to do.
    """

    def __init__(self, path: str | Path, reason: str, hint: str) -> None:
        self.path = str(path)
        self.reason = " ".join(str(reason).split())
        self.hint = " ".join(hint.split())
        super().__init__(f"{self.path}: {self.reason}; {self.hint}")


@runtime_checkable
class Reward(Protocol):
    """Scores images against their prompts; higher is better.

    A reward owns its preprocessing, in differentiable operations, and its weights, which stay frozen.
    ``name`` is its key in ``REWARDS``; ``differentiable`` says whether gradients reach the pixels (ReFL needs them).
    """

    name: str
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32.  ``tick`` is for rewards that change while training."""
        ...


def check_rows(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless every image has its prompt: one prompt, or one string, would be scored against all."""
    if isinstance(prompts, str) or len(images) != len(prompts):
        raise ValueError(f"{name}: {len(images)} images need as many prompts in a list, not {prompts!r:.80}")


@dataclass(frozen=True)
class Choices:
    """Where the field disagrees with what a reward's authors do.  None is the official way, and the default.

    ``antialias``: off is what torchvision before 0.17 did to tensors, and so what HPSv2 scored with then.
    ``resize_mode``: training code often squashes where the authors pad (HPSv2) or crop (PickScore, ImageReward).
    ``quick_gelu``: the activation that the tower is built with; with the wrong one it still runs, and scores wrongly.
    ``logit_scale``: whether the cosine is multiplied by the exponential of the weights' own ``logit_scale``.
    """

    antialias: bool | None = None
    resize_mode: ResizeMode | None = None
    quick_gelu: bool | None = None
    logit_scale: bool | None = None

    def refuse(self, weights: str | Path, name: str, *without: str) -> None:
        """RewardError where one of the fields ``without`` is set, which the reward ``name`` has no use for."""
        for field in fields(self):
            if field.name in without and getattr(self, field.name) is not None:
                raise RewardError(weights, f"{name} has no {field.name} to choose", f"leave {field.name} out")


OFFICIAL = Choices()


@dataclass(frozen=True)
class WeightsReport:
    """What a look at a weights file found, without building the model, and how the reward will use it."""

    path: str  # the file that holds the tensors
    kind: str  # "safetensors" or "torch"
    num_tensors: int
    num_parameters: int
    image_size_px: tuple[int, int]  # height, width of the tower's input
    choices: dict[str, str]  # what a score depends on beside the weights: resize, antialias, activation, score ...
    files: tuple[str, ...] = ()  # every file that the reward reads, ``path`` first

    def __str__(self) -> str:
        size = "x".join(str(side) for side in reversed(self.image_size_px))
        millions = self.num_parameters / 1e6
        how = ", ".join(self.choices.values())
        return f"{self.path}: {self.kind}, {millions:.1f} M parameters, {size} px, {how}"
