"""A pair of open_clip towers, frozen, and the reward that is the cosine between them.

Shapes: B batch, H and W px of the images, L text tokens, D width of the shared space.
Where the weights come from is a file (the architecture is then the one the reward was published with) or a folder with
``open_clip_config.json``, or transformers' ``config.json``, and a weights file, in open_clip's names or in those of
transformers' CLIPModel.  Nothing here asks a hub for anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from open_clip import CLIP, tokenize
from open_clip.model import convert_weights_to_lp
from torch import Tensor, nn

from rewards.base import OFFICIAL, Choices, ResizeMode, RewardError, WeightsReport
from rewards.frozen import FrozenReward, load_once
from rewards.hf_clip import to_open_clip
from rewards.preprocess import Preprocess
from rewards.tower_config import BPE_VOCABULARY, read_config, read_preprocess
from rewards.weights import Shapes, check_shapes, file_kind, find_weights, read_shapes, read_state

MAX_CACHED_PROMPTS = 8192  # at D = 1024 in fp32: 32 MiB
# open_clip's ViT-H-14 as published: DFN5B-CLIP-ViT-H-14 (with QuickGELU), HPSv2.1, LAION-2B, PickScore.
VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": BPE_VOCABULARY, "width": 1024, "heads": 16, "layers": 24},
}


@dataclass(frozen=True)
class TowerSpec:
    """What a reward assumes where the weights do not say it themselves, and what its user chose instead."""

    quick_gelu: bool  # for a weights file; a folder's config says it itself
    resize_mode: ResizeMode  # for a weights file, and for a folder whose config is silent
    logit_scale: bool = False  # whether the score is the cosine times exp(logit_scale)
    centre: Literal["round", "floor"] = "round"
    choices: Choices = OFFICIAL
    published: dict[str, Any] = field(default_factory=lambda: VIT_H_14)
    published_name: str = "ViT-H-14"


@dataclass(frozen=True)
class Source:
    """Where a tower comes from, resolved: the file of the tensors, the architecture, the preprocessing."""

    weights: Path
    model_cfg: dict[str, Any]
    preprocess: Preprocess
    logit_scale: bool = False
    what: str = "ViT-H-14"  # the architecture in words, for messages
    config: Path | None = None  # the file that describes the architecture, if one does

    def told(self) -> dict[str, str]:
        """What a report says of how the weights are used."""
        gelu = "QuickGELU" if self.model_cfg.get("quick_gelu") else "GELU"
        score = "cosine x exp(logit_scale)" if self.logit_scale else "cosine"
        return {**self.preprocess.told(), "activation": gelu, "score": score}


def resolve(weights: str | Path, spec: TowerSpec) -> Source:
    """A weights file or a folder -> its Source.  Raises RewardError; reads no tensor."""
    path = Path(weights).expanduser()
    if path.is_dir():
        return in_folder(path, find_weights(path), spec)
    size = spec.published["vision_cfg"]["image_size"]
    model_cfg = deepcopy(spec.published) | {"quick_gelu": spec.quick_gelu}
    return _chosen(path, model_cfg, Preprocess((size, size), spec.resize_mode), spec, None)


def in_folder(folder: Path, weights: Path, spec: TowerSpec) -> Source:
    """The Source of a weights file beside which a config stands.  Raises RewardError."""
    path, config = read_config(folder)
    return _chosen(weights, config["model_cfg"], read_preprocess(path, config, spec.resize_mode), spec, path)


def _chosen(
    weights: Path, model_cfg: dict[str, Any], preprocess: Preprocess, spec: TowerSpec, config: Path | None
) -> Source:
    """With the user's choices in place of what the reward or the config says."""
    file_kind(weights)
    choices = spec.choices
    if choices.quick_gelu is not None:
        model_cfg = model_cfg | {"quick_gelu": choices.quick_gelu}
    published = model_cfg["vision_cfg"] == spec.published["vision_cfg"]
    kind = spec.published_name if published else f"tower of {config.name if config else weights.name}"
    return Source(
        weights,
        model_cfg,
        replace(preprocess, centre=spec.centre).chosen(choices),
        logit_scale=spec.logit_scale if choices.logit_scale is None else choices.logit_scale,
        what=f"{kind} ({preprocess.size_px[1]} px)",
        config=config,
    )


def inspect(weights: str | Path, spec: TowerSpec) -> WeightsReport:
    """Whether a tower could be built: files, architecture, names, shapes.  Allocates nothing.  Raises RewardError."""
    return report(resolve(weights, spec))


def report(source: Source) -> WeightsReport:
    """What a look at a tower's file found.  Raises RewardError where it is not what the tower needs."""
    model = empty_model(source, torch.float32)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(source.weights, tower_shapes(source.weights), wanted, source.what)
    return WeightsReport(
        path=str(source.weights),
        kind=file_kind(source.weights),
        num_tensors=len(wanted),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size_px=source.preprocess.size_px,
        choices=source.told(),
        files=(str(source.weights),),
    )


@dataclass(frozen=True)
class CosineFiles:
    """What a reward that is the cosine of two towers offers: ``build`` and ``inspect`` of its weights."""

    name: str
    spec: TowerSpec

    def build(
        self,
        weights: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        checkpointing: bool = False,
        choices: Choices = OFFICIAL,
    ) -> CosineReward:
        """A weights file of the published architecture, or a folder with its config.  Raises RewardError."""
        source = resolve(weights, replace(self.spec, choices=choices))
        return CosineReward(self.name, source, dtype=dtype, device=device, checkpointing=checkpointing)

    def inspect(self, weights: str | Path, choices: Choices = OFFICIAL) -> WeightsReport:
        """Whether ``build`` would find what it needs, without building.  Raises RewardError."""
        return inspect(weights, replace(self.spec, choices=choices))


def tower_shapes(path: Path) -> Shapes:
    """``read_shapes`` under open_clip's names."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in read_shapes(path).items()}
    return {name: tuple(tensor.shape) for name, tensor in to_open_clip(empty).items()}


def empty_model(source: Source, dtype: torch.dtype) -> CLIP:
    """The towers on the meta device: every shape and dtype, no memory.

    In half precision the weights of layers are halved and the norms stay fp32, which is open_clip's own
    ``precision="bf16"``; fp64 serves checks of the gradient.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    try:
        with torch.device("meta"):
            model = CLIP(**deepcopy(source.model_cfg), cast_dtype=dtype if half else None)
    except Exception as error:  # a config of the user's: TypeError, KeyError, ZeroDivisionError, assertions ...
        reason = f"describes no tower that open_clip can build ({type(error).__name__}: {error})"
        raise RewardError(source.config or source.weights, reason, "compare it with a config of open_clip") from None
    if half:
        convert_weights_to_lp(model, dtype)
    else:
        model.to(dtype)
    return model


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> CLIP:
    """The towers with their weights, frozen, in eval mode.  Every name and shape must match.  Raises RewardError.

    Rewards that read the same file share them.
    """
    how = (repr(source.model_cfg), dtype, device)
    return cast(CLIP, load_once(source.weights, how, lambda: _load_model(source, dtype, device)))


def _load_model(source: Source, dtype: torch.dtype, device: torch.device) -> CLIP:
    model = empty_model(source, dtype)
    wanted = model.state_dict()
    state = to_open_clip(read_state(source.weights))
    found_shapes, wanted_shapes = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (state, wanted))
    check_shapes(source.weights, found_shapes, wanted_shapes, source.what)
    for name, target in wanted.items():  # one at a time: the file's copy goes as the tower's comes
        state[name] = state.pop(name).reshape(target.shape).to(device=device, dtype=target.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    if model.attn_mask is not None:  # not part of the state; the causal mask of open_clip's TextTransformer
        length = model.context_length
        model.attn_mask = torch.full((length, length), float("-inf"), device=device).triu_(1)
    return cast(CLIP, model.eval().requires_grad_(False))


def unit_features(reward: FrozenReward, visual: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, D) of length one, of an open_clip image tower."""
    with torch.autocast(reward.device.type, enabled=False):
        cast(Any, visual).set_grad_checkpointing(reward.checkpointing)  # told each time: rewards may share a tower
        features = visual(reward.pixels(images))
        return nn.functional.normalize(features.to(reward.wide), dim=-1)


class CosineReward(FrozenReward):
    """Cosine between an image and its raw prompt in the shared space of two towers; no bias, and no scale by default.

    Prompts are encoded one by one, so that a cached feature is bitwise the one that another batch, or a resumed run,
    would compute.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        checkpointing: bool = False,
    ) -> None:
        super().__init__(name, source.preprocess, dtype, device, checkpointing)
        self.source = source
        self.model = load_model(source, dtype, self.device)
        self.scale = self.model.logit_scale.exp().to(self.wide) if source.logit_scale else 1.0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (self.encode_images(images) * self.encode_prompts(prompts)).sum(-1)

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) of length one."""
        return unit_features(self, self.model.visual, images)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, D) of length one, without a graph.  Tokens beyond ``context_length`` are cut, as in CLIP."""
        batch = [self._encode_prompt(prompt) for prompt in prompts]
        while len(self._features) > MAX_CACHED_PROMPTS:
            self._features.popitem(last=False)
        return torch.stack(batch) if batch else torch.empty(0, self.source.model_cfg["embed_dim"], device=self.device)

    def _encode_prompt(self, prompt: str) -> Tensor:
        if prompt not in self._features:
            tokens = tokenize([prompt], self.model.context_length).to(
                self.device, non_blocking=True
            )  # (1, L), open_clip's own BPE
            # what evaluation caches under inference_mode must still serve training
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                features = self.model.encode_text(tokens).to(self.wide)
            self._features[prompt] = nn.functional.normalize(features, dim=-1)[0]
        self._features.move_to_end(prompt)
        return self._features[prompt]
