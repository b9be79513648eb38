"""The tiny SDXL UNet: its configuration, the folder around it, and its training by the toolkit's own `--method sft`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from shapes import finetune
from shapes.oracle import adherence
from shapes.scenes import unique_captions
from shapes.tokenizer import new_tokenizer

TIME_ID_WIDTH = 32  # width of the embedding of each of SDXL's six size numbers


@dataclass(frozen=True)
class DenoiserRecipe:
    """Architecture and training of the UNet."""

    seed: int = 41
    channels: tuple[int, ...] = (64, 96)
    heads: tuple[int, ...] = (2, 3)
    layers_per_block: int = 1
    pictures: int = 6144
    steps: int = 4400
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    warmup: int = 200
    caption_dropout: float = 0.1


def new_unet(recipe: DenoiserRecipe, text_widths: tuple[int, int]) -> UNet2DConditionModel:
    """An untrained UNet with SDXL's configuration keys."""
    n = len(recipe.channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (n - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (n - 1), "UpBlock2D"),
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        transformer_layers_per_block=[1] * n,
        attention_head_dim=list(recipe.heads),  # as in SDXL's config, these are numbers of heads
        cross_attention_dim=sum(text_widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + text_widths[1],
        norm_num_groups=16,
    )


def new_scheduler() -> EulerDiscreteScheduler:
    """SDXL's scheduler_config."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        steps_offset=1,
        timestep_spacing="leading",
        interpolation_type="linear",
        use_karras_sigmas=False,
    )


def assemble(
    vae: AutoencoderKL,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    unet: UNet2DConditionModel,
    folder: Path,
) -> None:
    """Write a complete half-precision StableDiffusionXLPipeline folder."""
    first, second = new_tokenizer(), new_tokenizer()
    second.pad_token = "!"  # noqa: S105  as SDXL's second tokenizer pads
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    pipeline.to(dtype=torch.float32)


def load_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The folder in fp32, silent."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_teacher(
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    cfg: float,
    steps: int = 25,
    batch: int = 100,
    seed: int = 0,
) -> Tensor:
    """(B, 3, 64, 64) in [0, 1]: the stock pipeline on `prompts`."""
    out = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        latents = torch.randn(len(part), 4, 8, 8, generator=torch.Generator().manual_seed(seed + start))
        images = pipeline(
            part, height=64, width=64, num_inference_steps=steps, guidance_scale=cfg, latents=latents, output_type="pt"
        ).images
        out.append(images.float().clamp(0, 1))
    return torch.cat(out)


def teacher_adherence(folder: Path, cfgs: tuple[float, ...], count: int = 500, steps: int = 25) -> dict[float, float]:
    """Oracle adherence on held-out prompts at each guidance scale."""
    pipeline = load_pipeline(folder)
    prompts = unique_captions("heldout", 0, count)
    return {cfg: float(adherence(sample_teacher(pipeline, prompts, cfg, steps), prompts).mean()) for cfg in cfgs}


def train_denoiser(folder: Path, work: Path, recipe: DenoiserRecipe, run_name: str) -> None:
    """Train the UNet of `folder` and put it back there in half precision."""
    trained = finetune.supervised(folder, work, recipe, run_name, pictures_seed=recipe.seed)
    finetune.install(trained, folder / "unet", UNet2DConditionModel)
