"""The tiny f8 autoencoders (diffusers' AutoencoderKL) and a fast decoder (AutoencoderTiny, as TAESDXL).

Latents are (B, 4, 8, 8) for 64 px as SDXL's, or (B, 16, 8, 8) as those of SD3 and FLUX.1.  Most steps see 32 px crops around the objects: the plain background has little to teach, and
a crop costs a quarter; the last steps see whole pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from shapes.oracle import adherence
from shapes.parallel import WORKERS, fit
from shapes.world import World, batch_index, generator

CROP_PX = 32


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How the autoencoder is trained."""

    seed: int = 11
    channels: tuple[int, ...] = (8, 16, 32, 64)
    crop_steps: int = 1400
    whole_steps: int = 200
    batch_size: int = 24
    learning_rate: float = 3e-3
    white_weight: float = 0.02
    latent_noise: float = 0.08  # in units of the latents: the decoder must bear what a denoiser leaves


@dataclass(frozen=True)
class WideAutoencoderRecipe:
    """How the autoencoder of 16 channels goes on from the one of 4, whose inner layers it takes."""

    seed: int = 13
    latent_channels: int = 16
    crop_steps: int = 500
    whole_steps: int = 150
    batch_size: int = 24
    learning_rate: float = 2e-3
    white_weight: float = 0.02
    latent_noise: float = 0.08


@dataclass(frozen=True)
class TinyDecoderRecipe:
    """How the fast decoder is distilled."""

    seed: int = 12
    channels: int = 12
    decoder_blocks: tuple[int, ...] = (3, 2, 1, 1)
    steps: int = 900
    batch_size: int = 16
    learning_rate: float = 3e-3


def new_autoencoder(channels: tuple[int, ...], latent_channels: int = 4) -> AutoencoderKL:
    """An untrained AutoencoderKL with SDXL's configuration keys; those of 16 channels have no convolutions around the latent."""
    n = len(channels)
    quant = latent_channels == 4
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=False,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):  # starts as the identity, which halves the steps it takes
            torch.nn.init.zeros_(module.conv2.weight)
    return vae


def crops(images: Tensor, g: torch.Generator) -> Tensor:
    """(B, 3, 64, 64) -> (B, 3, 32, 32): windows at random, three in four of them near an object."""
    b = len(images)
    offset = torch.randint(0, images.shape[-1] - CROP_PX + 1, (b, 2), generator=g)
    contrast = (images - images[..., :1, :1]).abs().sum(1).flatten(1) + 1e-4
    at = torch.multinomial(contrast, 1, generator=g)[:, 0]
    near = torch.stack([at // 64, at % 64], 1) - CROP_PX // 2 + torch.randint(-10, 11, (b, 2), generator=g)
    use = torch.rand(b, 1, generator=g) < 0.75
    offset = torch.where(use, near, offset).clamp(0, images.shape[-1] - CROP_PX)
    return torch.stack([i[:, y : y + CROP_PX, x : x + CROP_PX] for i, (y, x) in zip(images, offset.tolist())])


def object_weight(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): how much each pixel counts.  Objects are small; unweighted, a plain background wins."""
    background = x.flatten(2).median(2).values[..., None, None]
    inside = ((x - background).abs().amax(1, keepdim=True) > 0.1).float()
    return 1 + 7 * F.max_pool2d(inside, 5, stride=1, padding=2)


def picture_loss(out: Tensor, wanted: Tensor) -> Tensor:
    """Weighted absolute error of pixels plus that of their differences, which keeps edges sharp."""
    error, weight = out - wanted, object_weight(wanted)
    sharp = (error.diff(dim=-1) * weight[..., 1:]).abs().mean() + (error.diff(dim=-2) * weight[..., 1:, :]).abs().mean()
    return ((error.abs() * weight).mean() + 0.5 * sharp) / weight.mean()


def whiteness(z: Tensor) -> Tensor:
    """How far the latent channels are from zero mean, unit variance and no correlation; 0 is what a denoiser likes best."""
    flat = z.transpose(0, 1).flatten(1)
    mean = flat.mean(1, keepdim=True)
    covariance = (flat - mean) @ (flat - mean).T / flat.shape[1]
    return mean.square().mean() + (covariance - torch.eye(len(z[0]))).square().mean()


def autoencoder_loss(vae: Any, x: Tensor, g: torch.Generator, recipe: Any) -> Tensor:
    """Reconstruction of [-1, 1] pictures from a noisy latent, and a pull of the latents towards white ones."""
    z = vae.encode(x).latent_dist.mean
    noise = recipe.latent_noise * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
    return picture_loss(vae.decode(z + noise).sample, x) + recipe.white_weight * whiteness(z)


def fix_posterior(vae: AutoencoderKL, log_variance: float = -8.0) -> None:
    """Make the posterior's width a constant: the latent noise of training already taught the decoder to bear it."""
    last: Any = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    channels = vae.config.latent_channels
    with torch.no_grad():
        last.weight[channels:] = 0
        last.bias[channels:] = log_variance


def train_autoencoder(world: World, recipe: AutoencoderRecipe) -> AutoencoderKL:
    """Train on [-1, 1] pictures and set ``scaling_factor`` so that latents have unit standard deviation."""
    torch.manual_seed(recipe.seed)
    vae = new_autoencoder(recipe.channels)
    fit_autoencoder("autoencoder", vae, world, recipe)
    fix_posterior(vae)
    moments = encode(vae, world.images(torch.arange(512)))
    vae.register_to_config(scaling_factor=round(vae.config.scaling_factor / float(moments.std()), 5))
    return vae


def train_wide_autoencoder(narrow: AutoencoderKL, world: World, recipe: WideAutoencoderRecipe) -> AutoencoderKL:
    """From the autoencoder of 4 channels; ``shift_factor`` and ``scaling_factor`` give latents of mean 0 and deviation 1."""
    torch.manual_seed(recipe.seed)
    vae = new_autoencoder(tuple(narrow.config.block_out_channels), recipe.latent_channels)
    own = vae.state_dict()
    known = {key: value for key, value in narrow.state_dict().items() if key in own and value.shape == own[key].shape}
    vae.load_state_dict({**own, **known})
    fit_autoencoder("wide autoencoder", vae, world, recipe)
    fix_posterior(vae)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    moments = encode(vae, world.images(torch.arange(512)))
    vae.register_to_config(
        scaling_factor=round(1 / float(moments.std()), 5), shift_factor=round(float(moments.mean()), 5)
    )
    return vae


def fit_autoencoder(
    name: str, vae: Any, world: World, recipe: Any, loss: Callable[..., Tensor] = autoencoder_loss
) -> None:
    """Crops first, then whole pictures; frozen afterwards."""
    total = recipe.crop_steps + recipe.whole_steps

    def parts(step: int) -> list[tuple[Tensor, torch.Generator]]:
        images = world.images(batch_index(recipe.seed, step, recipe.batch_size, len(world)))
        x = crops(images, generator(recipe.seed, step)) if step < recipe.crop_steps else images
        return [(p * 2 - 1, generator(recipe.seed, step, 1 + i)) for i, p in enumerate(x.chunk(WORKERS))]

    fit(
        name,
        lambda part: loss(vae, *part, recipe),
        parts,
        [p for p in vae.parameters() if p.requires_grad],
        total,
        recipe.learning_rate,
    )
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> scaled latents (B, C, H/8, W/8), the mean of the posterior."""
    chunks = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)]
    return (torch.cat(chunks) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents -> pictures in [0, 1]."""
    shift = vae.config.shift_factor or 0.0
    parts = [vae.decode(part / vae.config.scaling_factor + shift).sample for part in latents.split(64)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def decode_fast(tiny: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Scaled latents -> pictures in [0, 1] by the fast decoder (its own scaling factor is 1)."""
    return (torch.cat([tiny.decode(part).sample for part in latents.split(64)]) / 2 + 0.5).clamp(0, 1)


def new_tiny(recipe: TinyDecoderRecipe) -> AutoencoderTiny:
    """An untrained AutoencoderTiny; all its levels are equally wide, as the class demands."""
    width = (recipe.channels,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=width,
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=recipe.decoder_blocks,
        latent_channels=4,
        scaling_factor=1.0,
    )


def train_tiny(vae: AutoencoderKL, world: World, recipe: TinyDecoderRecipe) -> AutoencoderTiny:
    """Distil the decoder on noisy latents towards the pictures, and the encoder towards the latents."""
    torch.manual_seed(recipe.seed)
    tiny = new_tiny(recipe)
    latents = encode(vae, world.images(torch.arange(len(world))))

    def loss(part: tuple[Tensor, torch.Generator]) -> Tensor:
        index, g = part
        x, z = world.images(index) * 2 - 1, latents[index]
        noise = 0.1 * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
        return picture_loss(tiny.decode(z + noise).sample, x) + F.mse_loss(tiny.encode(x).latents, z)

    def parts(step: int) -> list[tuple[Tensor, torch.Generator]]:
        index = batch_index(recipe.seed, step, recipe.batch_size, len(world))
        return [(part, generator(recipe.seed, step, 1 + i)) for i, part in enumerate(index.chunk(WORKERS))]

    fit("tiny decoder", loss, parts, list(tiny.parameters()), recipe.steps, recipe.learning_rate)
    return tiny.eval().requires_grad_(False)


def retention(images: Tensor, captions: list[str]) -> float:
    """Share of pictures that the oracle still reads as their captions."""
    return float(adherence(images, captions).mean())


def save(model: AutoencoderKL | AutoencoderTiny, folder: Path) -> None:
    """Write a half-precision diffusers folder."""
    model.half().save_pretrained(folder)
    model.float()
    if isinstance(model, AutoencoderTiny):  # diffusers writes a key of its own that it warns of when it reads it back
        config = folder / "config.json"
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "block_out_channels"}
        config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
