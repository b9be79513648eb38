"""What the authors' packages and ours are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

SIZES = ((32, 32), (64, 64), (96, 48), (40, 72), (45, 77), (37, 100), (20, 31))  # height, width in px
PROMPTS = (
    "a red circle", "two small blue squares on a yellow ground", "A Painting of a cat, 1920's style", "a dog",
    "naive cafe " + "with a very long description of what stands on each table, " * 4, "a red circle", "!",
)  # fmt: skip


def picture(height_px: int, width_px: int) -> np.ndarray:
    """(H, W, 3) uint8: waves in the three channels, the same on every machine."""
    y, x, channel = np.mgrid[0:height_px, 0:width_px, 0:3].astype(np.int64)
    return ((x * (3 + channel) * 5 + y * (7 - channel) * 3 + (x * y) // (5 + channel) * 11) % 256).astype(np.uint8)


def digest(content: np.ndarray | Mapping[str, torch.Tensor]) -> str:
    """sha256 of an array, or of a state dict to five digits."""
    if isinstance(content, np.ndarray):
        return hashlib.sha256(content.tobytes()).hexdigest()
    found = hashlib.sha256()
    for name in sorted(content):
        rounded = (content[name].double() * 1e4).round().to(torch.int64)
        found.update(name.encode() + rounded.contiguous().numpy().tobytes())
    return found.hexdigest()
