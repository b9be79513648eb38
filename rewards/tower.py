"""A pair of open_clip towers, frozen, and the reward that is the cosine between them.

Shapes: B batch, H and W px of the images, L text tokens, D width of the shared space.
Where the weights come from is a file (the architecture is then the one the reward was published with) or a folder with
``open_clip_config.json`` and a weights file.  Nothing here asks a hub for anything.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from open_clip import CLIP, tokenize
from open_clip.model import convert_weights_to_lp
from torch import Tensor, nn

from rewards.base import RewardError, WeightsReport, check_rows
from rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess, ResizeMode
from rewards.weights import check_shapes, file_kind, find_weights, read_shapes, read_state

CONFIG_NAME = "open_clip_config.json"
BPE_VOCABULARY = 49408  # tokens in the vocabulary that open_clip carries
MAX_CACHED_PROMPTS = 8192  # at D = 1024 in fp32: 32 MiB
# open_clip's ViT-H-14 as published: DFN5B-CLIP-ViT-H-14 (with QuickGELU), HPSv2.1, LAION-2B.
VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": BPE_VOCABULARY, "width": 1024, "heads": 16, "layers": 24},
}
# Settings that would make open_clip ask a hub, or build something other than a CLIP.
FOREIGN = ("custom_text", "multimodal_cfg", "hf_model_name", "hf_tokenizer_name", "timm_model_name")


@dataclass(frozen=True)
class TowerSpec:
    """What a reward assumes where the weights do not say it themselves."""

    quick_gelu: bool  # for a weights file; a folder's config says it itself
    resize_mode: ResizeMode  # for a weights file, and for a folder whose config is silent


@dataclass(frozen=True)
class Source:
    """Where a tower comes from, resolved: the file of the tensors, the architecture, the preprocessing."""

    weights: Path
    model_cfg: dict[str, Any]
    preprocess: Preprocess

    @property
    def what(self) -> str:
        """The architecture in words, for messages."""
        published = self.model_cfg["vision_cfg"] == VIT_H_14["vision_cfg"]
        kind = "ViT-H-14" if published else f"tower of {CONFIG_NAME}"
        return f"{kind} ({self.preprocess.size_px[1]} px)"


def resolve(weights: str | Path, spec: TowerSpec) -> Source:
    """A weights file or a folder -> its Source.  Raises RewardError; reads no tensor."""
    path = Path(weights).expanduser()
    if path.is_dir():
        config = _read_config(path / CONFIG_NAME)
        source = Source(find_weights(path), config["model_cfg"], _preprocess(path / CONFIG_NAME, config, spec))
    else:
        model_cfg = deepcopy(VIT_H_14) | {"quick_gelu": spec.quick_gelu}
        source = Source(path, model_cfg, Preprocess((224, 224), spec.resize_mode))
    file_kind(source.weights)
    return source


def inspect(weights: str | Path, spec: TowerSpec) -> WeightsReport:
    """Whether a tower could be built: files, architecture, names, shapes.  Allocates nothing.  Raises RewardError."""
    source = resolve(weights, spec)
    model = empty_model(source, torch.float32)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(source.weights, read_shapes(source.weights), wanted, source.what)
    return WeightsReport(
        path=str(source.weights),
        kind=file_kind(source.weights),
        num_tensors=len(wanted),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size_px=source.preprocess.size_px,
        quick_gelu=bool(source.model_cfg.get("quick_gelu", False)),
        resize_mode=source.preprocess.resize_mode,
    )


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
        config = source.weights.parent / CONFIG_NAME
        reason = f"describes no tower that open_clip can build ({type(error).__name__}: {error})"
        raise RewardError(config, reason, "compare it with a config of open_clip") from None
    if half:
        convert_weights_to_lp(model, dtype)
    else:
        model.to(dtype)
    return model


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> CLIP:
    """The towers with their weights, frozen, in eval mode.  Every name and shape must match.  Raises RewardError."""
    model = empty_model(source, dtype)
    wanted = model.state_dict()
    state = read_state(source.weights)
    found_shapes, wanted_shapes = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (state, wanted))
    check_shapes(source.weights, found_shapes, wanted_shapes, source.what)
    for name, target in wanted.items():  # one at a time: the file's copy goes as the tower's comes
        state[name] = state.pop(name).reshape(target.shape).to(device=device, dtype=target.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    if model.attn_mask is not None:  # not part of the state; the causal mask of open_clip's TextTransformer
        length = model.context_length
        model.attn_mask = torch.full((length, length), float("-inf"), device=device).triu_(1)
    return cast(CLIP, model.eval().requires_grad_(False))


class CosineReward:
    """Cosine between an image and its raw prompt in the shared space of two towers; no scale, no bias.

    ``dtype`` is that of the towers' layers; preprocessing, the cosine and the scores are fp32.  An autocast around the
    call changes nothing.  ``checkpointing`` spends a second forward pass of the image tower to save its activations.

    A score depends on its own image and prompt alone.  Prompts are encoded one by one, so that a cached feature is
    bitwise the one that another batch, or a resumed run, would compute.
    """

    differentiable = True

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        checkpointing: bool = False,
    ) -> None:
        self.name = name
        self.source = source
        self.device = torch.device(device)
        self.dtype = dtype
        self.model = load_model(source, dtype, self.device)
        self.model.set_grad_checkpointing(checkpointing)
        self._wide = torch.promote_types(dtype, torch.float32)  # fp32, or fp64 for checks
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, images: Tensor, prompts: Sequence[str], *, tick: int = 0) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32 in [-1, 1].  Gradients reach ``images``."""
        return self.cosine(images, prompts).float()

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As the call, in fp64 where the towers are fp64."""
        check_rows(self.name, images, prompts)
        return (self.encode_images(images) * self.encode_prompts(prompts)).sum(-1)

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) of length one."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"{self.name}: images are (B, 3, H, W) floats, not {tuple(images.shape)} {images.dtype}")
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.source.preprocess(images.to(self.device, self._wide))
            features = self.model.encode_image(pixels.to(self.dtype))
            return nn.functional.normalize(features.to(self._wide), dim=-1)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, D) of length one, without a graph.  Tokens beyond ``context_length`` are cut, as in CLIP."""
        batch = [self._encode_prompt(prompt) for prompt in prompts]
        while len(self._features) > MAX_CACHED_PROMPTS:
            self._features.popitem(last=False)
        return torch.stack(batch) if batch else torch.empty(0, self.source.model_cfg["embed_dim"], device=self.device)

    def _encode_prompt(self, prompt: str) -> Tensor:
        if prompt not in self._features:
            tokens = tokenize([prompt], self.model.context_length).to(self.device)  # (1, L), open_clip's own BPE
            # what evaluation caches under inference_mode must still serve training
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                features = self.model.encode_text(tokens).to(self._wide)
            self._features[prompt] = nn.functional.normalize(features, dim=-1)[0]
        self._features.move_to_end(prompt)
        return self._features[prompt]


def _read_config(path: Path) -> dict[str, Any]:
    """``open_clip_config.json``, with what this project can build checked."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RewardError(
            path, "there is no such file", "a folder needs it beside the weights, or name the file"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RewardError(path, f"cannot be read as JSON ({error})", "download it again") from None
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise RewardError(path, "has no model_cfg with embed_dim, vision_cfg, text_cfg", "use open_clip's layout")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise RewardError(path, "has a vision_cfg or text_cfg that is not an object", "use open_clip's layout")
    foreign = [key for part in (model_cfg, vision, text) for key in FOREIGN if part.get(key)]
    if foreign:
        raise RewardError(
            path, f"asks for {foreign[0]!r}", "only open_clip's own CLIP with its own tokenizer is built here"
        )
    vocab_size = text.get("vocab_size", BPE_VOCABULARY)
    if not isinstance(vocab_size, int) or vocab_size < BPE_VOCABULARY:
        reason = f"has vocab_size {vocab_size!r}, but the CLIP tokenizer gives ids up to {BPE_VOCABULARY - 1}"
        raise RewardError(path, reason, f"use a tower with the whole vocabulary of {BPE_VOCABULARY}")
    return config


def _preprocess(path: Path, config: dict[str, Any], spec: TowerSpec) -> Preprocess:
    """A folder's ``preprocess_cfg``; the size is the tower's own."""
    given = config.get("preprocess_cfg") or {}
    size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    try:
        height, width = (size, size) if isinstance(size, int) else size
        preprocess = Preprocess(
            size_px=(int(height), int(width)),
            resize_mode=given.get("resize_mode") or spec.resize_mode,
            mean=_three(given.get("mean"), OPENAI_MEAN),
            std=_three(given.get("std"), OPENAI_STD),
            interpolation=given.get("interpolation") or "bicubic",
            fill=float(given.get("fill_color", 0)) / 255,
        )
        known = preprocess.resize_mode in ("squash", "longest", "shortest")
        if not known or preprocess.interpolation not in ("bicubic", "bilinear") or 0 in preprocess.std:
            raise ValueError("resize_mode is squash, longest or shortest; interpolation bicubic or bilinear; std not 0")
    except (AttributeError, TypeError, ValueError) as error:
        raise RewardError(path, f"has a preprocess_cfg or image_size out of order ({error})", "correct it") from None
    return preprocess


def _three(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """One number, or three, or nothing -> three numbers."""
    if not values:
        return default
    three = (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)
    if len(three) != 3:
        raise ValueError(f"mean and std have 3 values, not {len(three)}")
    return three
