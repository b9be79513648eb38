"""Rewards that are easily gamed, to show that a guard sees it.

Shapes: images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def saturation(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """(B,) in [0, 1]: the mean over pixels of the largest colour less the smallest.  Says nothing of the prompt."""
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
