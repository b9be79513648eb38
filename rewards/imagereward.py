"""ImageReward: which image people would rank higher for a prompt.

Score: standardised over the authors' validation set, about -2 to 2; -0.4 to 1.2 for common models, 1.4 after
reinforcement learning.  BLIP: a ViT-L/16 reads the image, and a BERT that looks at it through cross-attention reads the
prompt, of which 35 tokens count.  A linear head reads its first token; then (x - 0.167) / 1.033.  The shortest side to
224 px, the middle cut out.

Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv:2304.05977.
Weights: ``ImageReward.pt`` of THUDM/ImageReward, with bert-base-uncased's ``vocab.txt`` beside it; a ``med_config.json`` there is
read, and need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rewards import blip
from rewards.base import OFFICIAL, Choices, WeightsReport
from rewards.frozen import FrozenReward, load_once
from rewards.preprocess import Preprocess
from rewards.weights import file_kind, find_weights

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' validation set
MAX_TOKENS = 35


class ImageReward(FrozenReward):
    """BLIP and its head.  The head is fp32, also where the rest is halved."""

    def __init__(
        self, source: blip.Source, choices: Choices, dtype: torch.dtype, device: str | torch.device, checkpointing: bool
    ) -> None:
        super().__init__("imagereward", preprocess(source, choices), dtype, device, checkpointing)
        self.source = source
        self.tokenizer = blip.tokenizer(source)
        how = (repr(source), dtype, self.device, checkpointing)
        model = load_once(source.weights, how, lambda: blip.load(source, dtype, self.device, checkpointing))
        self.model = cast(blip.Blip, model)

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        told = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        raw = self.model(self.pixels(images), told["input_ids"], told["attention_mask"])
        return (raw - MEAN) / STD


def build(
    weights: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
    choices: Choices = OFFICIAL,
) -> ImageReward:
    """ImageReward's weights file with the vocabulary beside it, or their folder.  Raises RewardError."""
    return ImageReward(resolve(weights, choices), choices, dtype, device, checkpointing)


def inspect(weights: str | Path, choices: Choices = OFFICIAL) -> WeightsReport:
    """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
    source = resolve(weights, choices)
    shapes = blip.wanted_shapes(source)
    blip.tokenizer(source)
    return WeightsReport(
        path=str(source.weights),
        kind=file_kind(source.weights),
        num_tensors=len(shapes),
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        image_size_px=(source.image_size_px, source.image_size_px),
        choices=preprocess(source, choices).told() | {"activation": "GELU", "score": "standardised"},
        files=(str(source.weights), str(source.vocabulary)),
    )


def resolve(weights: str | Path, choices: Choices) -> blip.Source:
    """A weights file or a folder -> its Source.  Raises RewardError."""
    path = Path(weights).expanduser()
    choices.refuse(path, "imagereward", "logit_scale", "quick_gelu")
    return blip.resolve(find_weights(path) if path.is_dir() else path)


def preprocess(source: blip.Source, choices: Choices) -> Preprocess:
    """torchvision's Resize and CenterCrop, as the authors' package has them."""
    return Preprocess((source.image_size_px, source.image_size_px), "shortest").chosen(choices)
