"""HPSv2.1: how much people would like an image for its prompt.

Score: the raw cosine, in [-1, 1]; about 0.25 for SD 1.4, 0.3 for SDXL and up to 0.35 after reinforcement learning
(papers print it times 100).  A GELU ViT-H-14.  Its own preprocessing brings the longest side to 224 px and pads with
black to a square before normalisation; for square images that is the squash that training code often uses instead.

Wu et al. 2023, "Human Preference Score v2", arXiv:2306.09341; weights: HPS_v2.1_compressed.pt.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rewards import tower
from rewards.base import WeightsReport

SPEC = tower.TowerSpec(quick_gelu=False, resize_mode="longest")


def build(
    weights: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
) -> tower.CosineReward:
    """HPSv2.1's weights file, or a folder with ``open_clip_config.json``.  Raises RewardError."""
    source = tower.resolve(weights, SPEC)
    return tower.CosineReward("hpsv2", source, dtype=dtype, device=device, checkpointing=checkpointing)


def inspect(weights: str | Path) -> WeightsReport:
    """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
    return tower.inspect(weights, SPEC)
