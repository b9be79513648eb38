"""Tiny random models in the true formats, made from configs: seconds to build, nothing downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip.tokenization_clip import CLIPTokenizer as _CLIPTokenizer

from train_t2i.adapters import AdapterSpec
from train_t2i.families.base import Family
from train_t2i.log import LOSS_FILES
from train_t2i.networks import Networks, build_networks

ASCII = [chr(i) for i in range(33, 127)]
VOCABULARY = {
    word: i for i, word in enumerate([*ASCII, *(c + "</w>" for c in ASCII), "<|startoftext|>", "<|endoftext|>"])
}
ROLES = ("generator", "guidance", "teacher")
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's and SDXL's
ALPHAS_CUMPROD = DDPMScheduler(**NOISE).alphas_cumprod  # (1000,)


# -- models on disk --------------------------------------------------------------------------------------------------


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single characters."""
    return _CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=77)


def text_config(width: int, projection: int) -> CLIPTextConfig:
    size = len(VOCABULARY)
    return CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, projection_dim=projection,
        num_hidden_layers=3, num_attention_heads=2, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip


def sdxl_pipeline(seed: int = 0, *, second_config: bool = False, **scheduler: Any) -> StableDiffusionXLPipeline:
    """A random SDXL of a few hundred thousand parameters; ``second_config`` has other widths, depths and VAE factor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _sdxl_pipeline(second_config, scheduler)


def _sdxl_pipeline(second: bool, scheduler: dict[str, Any]) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(24, 32) if second else (16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, transformer_layers_per_block=(1, 2) if second else (1, 1), attention_head_dim=(2, 4),
        norm_num_groups=8, cross_attention_dim=40, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 48,
    )  # fmt: skip
    channels = (8, 16, 16) if second else (8, 8, 16, 16)
    vae = AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        scaling_factor=0.5 if second else 0.8,
    )  # fmt: skip
    euler = EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading", **scheduler)
    return StableDiffusionXLPipeline(
        vae, CLIPTextModel(text_config(16, 16)), CLIPTextModelWithProjection(text_config(24, 24)),
        tokenizer(), tokenizer(), unet, euler, add_watermarker=False,
    )  # fmt: skip


def save_sdxl(folder: Path, seed: int = 0, *, second_config: bool = False, **scheduler: Any) -> Path:
    sdxl_pipeline(seed, second_config=second_config, **scheduler).save_pretrained(folder)
    return folder


def save_tiny_vae(folder: Path, seed: int = 0) -> Path:
    """An AutoencoderTiny of factor 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
        )  # fmt: skip
    tiny.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("block_out_channels", None)  # diffusers writes it and then warns of it
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# -- data on disk ----------------------------------------------------------------------------------------------------


def save_prompts(path: Path, count: int = 40) -> Path:
    path.write_text("".join(f"a {c} circle number {i}\n" for i, c in zip(range(count), ["red", "blue"] * count)))
    return path


def save_images(folder: Path, count: int = 6, size_px: int = 32) -> Path:
    """Flat images and a table of their captions."""
    folder.mkdir(parents=True)
    lines = ["image,prompt"]
    for i in range(count):
        Image.new("RGB", (size_px, size_px), (40 * i, 255 - 40 * i, 90)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,colour {i}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


# -- in memory -------------------------------------------------------------------------------------------------------


def networks(
    family: Family,
    layout: str,
    *,
    trains: Sequence[str] = ("generator", "guidance"),
    uses: Sequence[str] = ROLES,
    rank: int = 2,
    seed: int = 0,
    **options: Any,
) -> Networks:
    """The roles of a family in fp32, adapters of ``rank`` from ``seed``."""
    specs = {"guidance": AdapterSpec(rank, rank), "generator": AdapterSpec(2 * rank, 4 * rank)}
    torch.manual_seed(seed)
    return build_networks(
        family, layout, specs, uses=tuple(uses), trains=tuple(trains), dtype=torch.float32,
        place=lambda net, blocks: None, **options,
    )  # fmt: skip


def shake(module: torch.nn.Module, only: str = "lora_B", seed: int = 1, size: float = 0.05) -> None:
    """Move the parameters whose name contains ``only`` off their start (LoRA starts as nothing)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


# -- runs ------------------------------------------------------------------------------------------------------------


def checkpoint_files(root: Path, step: int) -> Iterator[tuple[str, dict[str, Tensor] | Any]]:
    """(name, content) of every file of a checkpoint but its record: tensors or JSON."""
    for file in sorted((root / "checkpoints").glob(f"*/step-{step}/*")):
        name = f"{file.parent.parent.name}/{file.name}"
        yield name, load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text())


def assert_same_checkpoint(root: Path, other: Path, step: int) -> None:
    """Bit for bit: weights, optimizer states, exports."""
    mine, theirs = dict(checkpoint_files(root, step)), dict(checkpoint_files(other, step))
    assert mine
    assert mine.keys() == theirs.keys()
    for name, content in mine.items():
        if not name.endswith(".safetensors"):
            assert content == theirs[name], name
            continue
        assert content.keys() == theirs[name].keys(), name
        different = [key for key in content if not torch.equal(content[key], theirs[name][key])]
        assert not different, f"{name}: {len(different)} of {len(content)} differ, first {different[0]}"


def log_lines(root: Path, role: str = "generator") -> list[dict[str, Any]]:
    """The lines of a loss log, measured fields left out."""
    file = root / "loss_logs" / LOSS_FILES[role]
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    measured = ("seconds_tick", "peak_memory_gib")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def assert_same_logs(root: Path, other: Path) -> None:
    for role in LOSS_FILES:
        assert log_lines(root, role) == log_lines(other, role)
