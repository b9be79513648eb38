"""PickScore: which of several images for a prompt people would pick.

Score: the cosine times the exponential of the weights' own logit scale (about 100); 20 to 23 for images of common
models, up to 24 after reinforcement learning.  Training code divides by 20 to 26, or leaves the scale out:
``Choices(logit_scale=False)``.  A GELU ViT-H-14 in transformers' CLIPModel layout.  Its processor brings the shortest side
to 224 px and cuts out the middle.  Prompts go through open_clip's tokenizer, whose ids are those of the processor's, except
that it also repairs mojibake and HTML entities.

Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", arXiv:2305.01569;
weights: the folder, or model.safetensors, of yuvalkirstain/PickScore_v1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rewards import tower
from rewards.base import OFFICIAL, Choices, WeightsReport

SPEC = tower.TowerSpec(quick_gelu=False, resize_mode="shortest", logit_scale=True, centre="floor")


def build(
    weights: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
    choices: Choices = OFFICIAL,
) -> tower.CosineReward:
    """PickScore's weights file, or a folder with transformers' ``config.json``.  Raises RewardError."""
    source = tower.resolve(weights, replace(SPEC, choices=choices))
    return tower.CosineReward("pickscore", source, dtype=dtype, device=device, checkpointing=checkpointing)


def inspect(weights: str | Path, choices: Choices = OFFICIAL) -> WeightsReport:
    """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
    return tower.inspect(weights, replace(SPEC, choices=choices))
