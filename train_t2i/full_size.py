"""SDXL and ViT-H-14 in their published shapes with random weights: to measure time and memory without a download."""

from __future__ import annotations

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
from train_t2i.families.sdxl import SDXL
from train_t2i.families.sdxl_file import CLIP_G, CLIP_L, UNET, VAE, scheduler


def randomised(net: nn.Module, dtype: torch.dtype, seed: int = 0) -> Any:
    """A module made on the meta device -> small random weights in ``dtype``; norms start at one."""
    generator = torch.Generator().manual_seed(seed)
    net = net.to(dtype).to_empty(device="cpu")
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


def random_unet(dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    return randomised(unet, dtype)


def random_sdxl(dtype: torch.dtype, *, checkpoint_decoder: bool = False) -> SDXL:
    """The family with 2.6 billion random weights in the denoiser, and TAESDXL's decoder."""
    pipe = StableDiffusionXLPipeline(
        AutoencoderKL(**VAE), text_encoder(CLIPTextModel, CLIP_L, dtype),
        text_encoder(CLIPTextModelWithProjection, CLIP_G, dtype), tokenizer(), tokenizer(), unet=None,
        scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip
    return SDXL(pipe, random_unet, tiny=AutoencoderTiny(), checkpoint_decoder=checkpoint_decoder)


def random_vit_h_14(folder: Path, dtype: torch.dtype) -> Path:
    """A weights file as ViT-H-14 rewards are published, with random weights; read like any other."""
    path = folder / "random_vit_h_14.safetensors"
    tower = randomised(empty_model(Source(path, VIT_H_14, Preprocess((224, 224), "squash")), dtype), dtype)
    safetensors.torch.save_file(tower.state_dict(), path)
    return path
