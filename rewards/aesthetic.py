"""LAION's aesthetic predictor: how good an image looks, whatever its prompt.

Score: a mean opinion of 1 to 10; 5.1 to 5.7 for base models, 5.9 to 6.2 after reinforcement learning.  A linear map of
the image features, of length one, of OpenAI's CLIP ViT-L/14 (QuickGELU), kept as five layers without activations, as it
was trained.  The shortest side to 224 px, the middle cut out.  Prompts are not read.

Schuhmann et al. 2022, "LAION-5B", arXiv:2210.08402, and "Improved Aesthetic Predictor".  Weights: one folder with the head,
``sac+logos+ava1-l14-linearMSE.pth`` (sha256 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0), and beside it
the tower, ``model.safetensors`` of openai/clip-vit-large-patch14, or open_clip's; a ``config.json`` may describe another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards import tower
from rewards.base import OFFICIAL, Choices, RewardError, WeightsReport
from rewards.frozen import FrozenReward
from rewards.head import regression_head
from rewards.tower_config import BPE_VOCABULARY
from rewards.weights import SUFFIXES, check_shapes, file_kind, read_shapes, read_state

VIT_L_14: dict[str, Any] = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": BPE_VOCABULARY, "width": 768, "heads": 12, "layers": 12},
}
SPEC = tower.TowerSpec(quick_gelu=True, resize_mode="shortest", published=VIT_L_14, published_name="ViT-L-14")
HINT = "the folder holds sac+logos+ava1-l14-linearMSE.pth and model.safetensors of openai/clip-vit-large-patch14"


class Aesthetic(FrozenReward):
    """The head on the tower's features.  Its own layers are fp32, also where the tower's are halved."""

    def __init__(
        self, source: tower.Source, head: Path, dtype: torch.dtype, device: str | torch.device, checkpointing: bool
    ) -> None:
        super().__init__("aesthetic", source.preprocess, dtype, device, checkpointing)
        self.source = source
        self.model = tower.load_model(source, dtype, self.device)
        self.head = load_head(head, source, self.wide).to(self.device)

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head.layers(tower.unit_features(self, self.model.visual, images))[:, 0]  # type: ignore[operator]


def build(
    weights: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpointing: bool = False,
    choices: Choices = OFFICIAL,
) -> Aesthetic:
    """A folder with the head and the tower.  Raises RewardError."""
    source, head = resolve(weights, choices)
    return Aesthetic(source, head, dtype, device, checkpointing)


def inspect(weights: str | Path, choices: Choices = OFFICIAL) -> WeightsReport:
    """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
    source, head = resolve(weights, choices)
    found, shapes = tower.report(source), head_shapes(source)
    check_shapes(head, read_shapes(head), shapes, "head of the aesthetic predictor")
    return replace(
        found,
        num_tensors=found.num_tensors + len(shapes),
        num_parameters=found.num_parameters + sum(torch.Size(shape).numel() for shape in shapes.values()),
        choices=found.choices | {"score": "linear head"},
        files=(*found.files, str(head)),
    )


def resolve(weights: str | Path, choices: Choices) -> tuple[tower.Source, Path]:
    """The folder -> the tower's Source and the head's file, told apart by their tensors.  Raises RewardError."""
    folder = Path(weights).expanduser()
    choices.refuse(folder, "aesthetic", "logit_scale")
    if not folder.is_dir():
        file_kind(folder)
        raise RewardError(folder, "is one file, and this reward needs two", HINT)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    heads = [file for file in files if any(name.startswith("layers.") for name in read_shapes(file))]
    towers = [file for file in files if file not in heads]
    towers = [file for file in towers if file.suffix == SUFFIXES[0]] or towers
    if len(heads) != 1 or len(towers) != 1:
        reason = f"holds {len(heads)} heads and {len(towers)} towers where one of each belongs"
        raise RewardError(folder, reason, HINT)
    spec = replace(SPEC, choices=choices)
    described = any((folder / name).exists() for name in ("open_clip_config.json", "config.json"))
    source = tower.in_folder(folder, towers[0], spec) if described else tower.resolve(towers[0], spec)
    return source, heads[0]


def head_shapes(source: tower.Source) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the head on a tower's features."""
    with torch.device("meta"):
        head = regression_head(source.model_cfg["embed_dim"])
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


def load_head(path: Path, source: tower.Source, dtype: torch.dtype) -> nn.Module:
    """The head with its weights, frozen.  Raises RewardError."""
    state = read_state(path)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_shapes(path, found, head_shapes(source), "head of the aesthetic predictor")
    head = regression_head(source.model_cfg["embed_dim"])
    head.load_state_dict(state)
    return head.to(dtype).requires_grad_(False)
