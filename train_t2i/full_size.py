"""Models in their published shapes with random weights: to measure time and memory without a download.

They are made on the device that they serve on, in the format that they rest in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rewards.preprocess import Preprocess
from rewards.tower import VIT_H_14, Source, empty_model
from train_t2i.config import Config
from train_t2i.families import Cond
from train_t2i.families.published import PUBLISHED, Published
from train_t2i.families.sdxl import SDXL
from train_t2i.families.sdxl_file import CLIP_G, CLIP_L, UNET, VAE, scheduler
from train_t2i.plan.model import empty_family

CPU = torch.device("cpu")


def randomised(net: nn.Module, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU) -> Any:
    """A module made on the meta device -> small random weights in ``dtype``; norms start at one."""
    generator = torch.Generator(device).manual_seed(seed)
    net = net.to(dtype).to_empty(device=device)
    for name, parameter in net.named_parameters():
        if parameter.ndim < 2:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return net


def tokenizer() -> CLIPTokenizer:
    """CLIP's class over single characters: any text, ids in range."""
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder(kind: Any, shape: dict[str, Any], dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        made = kind(CLIPTextConfig(vocab_size=49408, bos_token_id=188, eos_token_id=189, pad_token_id=189, **shape))
    made = randomised(made, dtype)
    for name, positions in made.named_buffers():  # the only buffer of a text encoder, and random memory by now
        assert name.endswith("position_ids"), name
        positions.copy_(torch.arange(positions.shape[-1]))
    return made


def random_unet(dtype: torch.dtype, device: torch.device = CPU) -> nn.Module:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    return randomised(unet, dtype, device=device)


def random_sdxl(dtype: torch.dtype, *, checkpoint_decoder: bool = False, device: torch.device = CPU) -> SDXL:
    """The family with 2.6 billion random weights in the denoiser, and TAESDXL's decoder."""
    pipe = StableDiffusionXLPipeline(
        AutoencoderKL(**VAE), text_encoder(CLIPTextModel, CLIP_L, dtype),
        text_encoder(CLIPTextModelWithProjection, CLIP_G, dtype), tokenizer(), tokenizer(), unet=None,
        scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip
    load = partial(random_unet, device=device)
    return SDXL(pipe, load, tiny=AutoencoderTiny(), checkpoint_decoder=checkpoint_decoder)


def random_family(found: Published, run: Config, dtype: torch.dtype, device: torch.device) -> Any:
    """A published model, or a folder's shapes.  SDXL reads its texts; the others are told random ones, as by a cache."""
    if found == PUBLISHED["sdxl"]:
        return random_sdxl(dtype, checkpoint_decoder="decoder" in run.recomputed, device=device)

    def make(kind: Any, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as diffusers loads: tables of angles stay fp32
        try:
            with device:
                return kind.from_config(config)
        finally:
            torch.set_default_dtype(before)

    family = empty_family(found, run, dtype, make).family
    tell = family.encode

    def encode(prompts: Sequence[str], negative: str | None = None, sources: Sequence[Any] = ()) -> Cond:
        return filled(tell(prompts, negative, sources), torch.Generator(device).manual_seed(len(prompts)))

    family.encode = encode
    return family.to(device)


def filled(cond: Cond, generator: torch.Generator) -> Cond:
    """A conditioning without content -> one of random numbers."""

    def fill(part: Any) -> Any:
        return torch.randn(part.shape, dtype=part.dtype, device=generator.device, generator=generator)

    changed = {name: fill(getattr(cond, name)) for name in ("tokens", "pooled") if getattr(cond, name) is not None}
    if cond.guidance is not None:
        changed["guidance"] = fill(cond.guidance).abs()
    negative = None if cond.negative is None else filled(cond.negative, generator)
    return replace(cond, **changed, negative=negative, context=tuple(fill(part) for part in cond.context))


def random_vit_h_14(path: Path, dtype: torch.dtype) -> Path:
    """A weights file as ViT-H-14 rewards are published, with random weights; read like any other."""
    tower = randomised(empty_model(Source(path, VIT_H_14, Preprocess((224, 224), "squash")), dtype), dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tower.state_dict(), path)
    return path
