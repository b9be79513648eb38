"""What a reward is, and the one error it raises.  Light on purpose: torch is imported by type checkers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


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
class WeightsReport:
    """What a look at a weights file found, without building the model."""

    path: str  # the file that holds the tensors
    kind: str  # "safetensors" or "torch"
    num_tensors: int
    num_parameters: int
    image_size_px: tuple[int, int]  # height, width of the tower's input
    quick_gelu: bool
    resize_mode: str  # squash, longest or shortest

    def __str__(self) -> str:
        size = "x".join(str(side) for side in reversed(self.image_size_px))
        gelu = "QuickGELU" if self.quick_gelu else "GELU"
        millions = self.num_parameters / 1e6
        return f"{self.path}: {self.kind}, {millions:.1f} M parameters, {size} px, {self.resize_mode}, {gelu}"
