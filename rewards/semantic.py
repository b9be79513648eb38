"""Semantic-relative preference: how much more an image looks like one wording of its prompt than like another.

Score: ``f . ((1 + k) C+ - C-)`` with unit features f of the image, C+ and C- of "word. prompt" (SRPO, arXiv 2509.06942,
as DMDR uses it: one drawn pair of words for all rows of a tick).  The prompt's own content cancels but for k.
About k times the tower's cosine; any text-image tower serves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rewards.base import check_rows

if TYPE_CHECKING:
    from rewards.tower import CosineReward

POSITIVE = ("Natural-lighting", "Detailed", "Realistic")
NEGATIVE = ("Painting", "CG Render", "Oil")


@dataclass
class SemanticRelative:
    """A tower whose score is relative between two wordings.  The words are a function of (seed, tick) alone."""

    tower: CosineReward
    positive: tuple[str, ...] = POSITIVE
    negative: tuple[str, ...] = NEGATIVE
    k: float = 0.1
    seed: int = 0
    name: str = ""
    differentiable: bool = True

    def __post_init__(self) -> None:
        self.name = self.name or self.tower.name

    def words(self, tick: int) -> tuple[str, str]:
        """The pair of a tick: (positive, negative)."""
        key = hashlib.blake2b(f"{self.seed}/{tick}/words".encode(), digest_size=16).digest()
        first, second = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        return self.positive[first % len(self.positive)], self.negative[second % len(self.negative)]

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32 in [-2 - k, 2 + k].  Gradients reach ``images``."""
        check_rows(self.name, images, prompts)
        features = self.tower.encode_images(images)
        towards, away = (self.tower.encode_prompts([f"{word}. {p}" for p in prompts]) for word in self.words(tick))
        # SRPO's semantic-relative reward: r = f . ((1 + k) C+ - C-)
        return (features * ((1 + self.k) * towards - away)).sum(-1).float()
