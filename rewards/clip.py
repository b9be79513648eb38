"""CLIP: how well an image fits its prompt.

Score: the raw cosine, in [-1, 1]; about 0.2 to 0.45 for images of their prompts with DFN5B-CLIP-ViT-H-14, the tower of
the DMDR recipe.  It is trained with QuickGELU (x * sigmoid(1.702 x)); with GELU it still runs, and scores wrongly.
It squashes any image to its square input.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020;
Fang et al. 2023, "Data Filtering Networks", arXiv:2309.17425.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rewards import tower
from rewards.base import OFFICIAL, Choices, WeightsReport

SPEC = tower.TowerSpec(quick_gelu=True, resize_mode="squash")


def build(
    weights: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
    choices: Choices = OFFICIAL,
) -> tower.CosineReward:
    """A weights file of DFN5B-CLIP-ViT-H-14, or a folder with ``open_clip_config.json``.  Raises RewardError."""
    source = tower.resolve(weights, replace(SPEC, choices=choices))
    return tower.CosineReward("clip", source, dtype=dtype, device=device, checkpointing=checkpointing)


def inspect(weights: str | Path, choices: Choices = OFFICIAL) -> WeightsReport:
    """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
    return tower.inspect(weights, replace(SPEC, choices=choices))
