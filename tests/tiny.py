"""Tiny random models in the true formats, made from configs: seconds to build, nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip.tokenization_clip import CLIPTokenizer as _CLIPTokenizer

ASCII = [chr(i) for i in range(33, 127)]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single characters."""
    words = [*ASCII, *(c + "</w>" for c in ASCII), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return _CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_config(width: int, projection: int) -> CLIPTextConfig:
    size = len(ASCII) * 2 + 2
    return CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, projection_dim=projection,
        num_hidden_layers=3, num_attention_heads=2, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip


def sdxl_pipeline(seed: int = 0, *, second_config: bool = False) -> StableDiffusionXLPipeline:
    """A random SDXL of about a hundred thousand parameters; ``second_config`` has other widths, depths and VAE factor."""
    torch.manual_seed(seed)
    widths = (32, 48) if second_config else (32, 64)
    channels = (16, 16, 32, 32) if not second_config else (16, 32, 32)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, transformer_layers_per_block=(1, 2) if second_config else (1, 1), attention_head_dim=(2, 4),
        norm_num_groups=16 if not second_config else 8, cross_attention_dim=40, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 48,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        scaling_factor=0.8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae, CLIPTextModel(text_config(16, 16)), CLIPTextModelWithProjection(text_config(24, 24)),
        tokenizer(), tokenizer(), unet, scheduler, add_watermarker=False,
    )  # fmt: skip


def save_sdxl(folder: Path, seed: int = 0, *, second_config: bool = False) -> Path:
    sdxl_pipeline(seed, second_config=second_config).save_pretrained(folder)
    return folder


def save_tiny_vae(folder: Path, seed: int = 0) -> Path:
    """An AutoencoderTiny of factor 8."""
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip
    tiny.save_pretrained(folder)
    return folder


def save_tower(folder: Path, seed: int = 0) -> Path:
    """An open_clip tower of 32 px with the full CLIP vocabulary."""
    import open_clip

    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**model_cfg)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    torch.save({"state_dict": model.state_dict()}, folder / "tower.pt")
    return folder


def save_prompts(path: Path, count: int = 40) -> Path:
    path.write_text("".join(f"a {c} circle number {i}\n" for i, c in zip(range(count), ["red", "blue"] * count)))
    return path
