"""The small regression head that the aesthetic predictor and ImageReward have in common."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")  # dropouts stand between them in the files


def regression_head(width: int) -> nn.Module:
    """``width`` -> 1024 -> 128 -> 64 -> 16 -> 1 without activations, under the names of the published files."""
    sizes = (width, *WIDTHS)
    linear = [nn.Linear(before, after) for before, after in pairwise(sizes)]
    layers = [linear[0], nn.Identity(), linear[1], nn.Identity(), linear[2], nn.Identity(), linear[3], linear[4]]
    head = nn.Module()
    head.layers = nn.Sequential(*layers)
    return head
