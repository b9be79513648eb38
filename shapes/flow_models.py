"""The tiny SD3, FLUX.1 and Qwen-Image: their transformers' configurations and the pipeline folders around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn

from shapes.tokenizer import new_qwen_tokenizer, new_t5_tokenizer, new_tokenizer

PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "qwen_image": QwenImagePipeline}
TRANSFORMERS = {
    "sd3": SD3Transformer2DModel,
    "flux": FluxTransformer2DModel,
    "qwen_image": QwenImageTransformer2DModel,
}
TEXT_LENGTH = 32  # tokens; every caption fits
LATENT_CELLS = 8  # along one side


@dataclass(frozen=True)
class FlowRecipe:
    """Architecture and training of a transformer."""

    family: str
    seed: int
    width: int
    heads: int
    layers: int
    single_layers: int = 0  # FLUX.1's
    legs: tuple[int, ...] = (6500,)  # steps at which a cosine of the rate ends; the next goes on from there
    pictures: int = 6144
    pictures_seed: int = 41  # those of the tiny SDXL
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    warmup: int = 200
    caption_dropout: float = 0.1


def scheduler(family: str) -> FlowMatchEulerDiscreteScheduler:
    """The published scheduler_config of SD3, FLUX.1-dev and Qwen-Image."""
    if family == "sd3":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256, "num_train_timesteps": 1000}
    if family == "flux":
        return FlowMatchEulerDiscreteScheduler(**dynamic, max_shift=1.15, max_image_seq_len=4096, shift=3.0)
    return FlowMatchEulerDiscreteScheduler(
        **dynamic, max_shift=0.9, max_image_seq_len=8192, shift=1.0, shift_terminal=0.02, time_shift_type="exponential"
    )


def new_transformer(recipe: FlowRecipe, text_width: int, pooled_width: int) -> Any:
    """Untrained; every block starts as the identity (DiT, arXiv 2212.09748, section 3.2)."""
    shared = {
        "in_channels": 16, "num_layers": recipe.layers, "attention_head_dim": recipe.width // recipe.heads,
        "num_attention_heads": recipe.heads, "joint_attention_dim": text_width,
    }  # fmt: skip
    head = recipe.width // recipe.heads
    side = 2 * (3 * head // 16)
    axes = (head - 2 * side, side, side)  # even, and nearly as 16, 56, 56 of 128
    if recipe.family == "sd3":
        net: Any = SD3Transformer2DModel(
            **shared, sample_size=LATENT_CELLS, caption_projection_dim=recipe.width, pooled_projection_dim=pooled_width,
            pos_embed_max_size=LATENT_CELLS, qk_norm="rms_norm",
        )  # fmt: skip
    elif recipe.family == "flux":
        packed = {**shared, "in_channels": 64}
        net = FluxTransformer2DModel(
            **packed, num_single_layers=recipe.single_layers, pooled_projection_dim=pooled_width, guidance_embeds=True,
            axes_dims_rope=axes,
        )  # fmt: skip
    else:
        net = QwenImageTransformer2DModel(**{**shared, "in_channels": 64}, out_channels=16, axes_dims_rope=axes)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear",
            "img_mod.1", "txt_mod.1", "norm_out.linear")) or name == "proj_out"):  # fmt: skip
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def assemble(family: str, parts: dict[str, Any], folder: Path) -> None:
    """Write a complete half-precision pipeline folder; ``parts`` are the models, tokenizers are made here."""
    if family == "sd3":  # its network reads CLIP's padding too: 77 tokens for captions of a dozen would double its work
        first, second = new_tokenizer(TEXT_LENGTH), new_tokenizer(TEXT_LENGTH)
        second.pad_token = "!"  # noqa: S105  as CLIP-G's
        tokenizers = {"tokenizer": first, "tokenizer_2": second, "tokenizer_3": new_t5_tokenizer()}
    elif family == "flux":
        tokenizers = {"tokenizer": new_tokenizer(), "tokenizer_2": new_t5_tokenizer()}
    else:
        tokenizers = {"tokenizer": new_qwen_tokenizer()}
    pipeline = PIPELINES[family](**parts, **tokenizers, scheduler=scheduler(family))
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    pipeline.to(dtype=torch.float32)
