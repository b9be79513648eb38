"""The tiny autoencoder of Qwen-Image (diffusers' AutoencoderKLQwenImage): a video autoencoder that sees one frame.

Latents are (B, 16, 8, 8) for 64 px; the class has the frame in between, (B, 16, 1, 8, 8).
"""

from __future__ import annotations

import copy
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResidualBlock
from torch import Tensor

from shapes.autoencoder import autoencoder_loss, fit_autoencoder, retention
from shapes.render import SIDE_PX, paint, place
from shapes.scenes import rng_for
from shapes.world import World, generator
from train_t2i.families.qwen_image import single_frame

CHANNELS = 16


@dataclass(frozen=True)
class QwenAutoencoderRecipe:
    """How it is trained."""

    seed: int = 14
    base_width: int = 8
    width_factors: tuple[int, ...] = (1, 2, 3, 5)
    crop_steps: int = 1300
    whole_steps: int = 200
    batch_size: int = 24
    learning_rate: float = 3e-3
    white_weight: float = 0.02
    latent_noise: float = 0.08


@dataclass(frozen=True)
class RecolouredRecipe:
    """How it learns that any colour goes with any shape: four pairs of them are in no training picture, which it blurs."""

    seed: int = 31
    crop_steps: int = 2200
    whole_steps: int = 1100
    batch_size: int = 24
    learning_rate: float = 1.5e-3
    white_weight: float = 0.02
    latent_noise: float = 0.08
    recoloured_share: float = 0.5
    anchor_weight: float = 0.3  # of what the latents of pictures as they are were before


class OneFrame:
    """The autoencoder on (B, C, H, W), without the cache of earlier frames, which threads cannot share."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        single_frame(vae)

    def encode(self, x: Tensor) -> Any:
        moments = self.vae.quant_conv(self.vae.encoder(x.unsqueeze(2)))[:, :, 0]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=moments[:, :CHANNELS]))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=self.vae.decoder(self.vae.post_quant_conv(z.unsqueeze(2)))[:, :, 0])

    def parameters(self) -> list[Any]:
        """Without the parts that join frames, which never run."""
        return [p for name, p in self.vae.named_parameters() if "time_conv" not in name]

    def eval(self) -> OneFrame:
        self.vae.eval()
        return self

    def requires_grad_(self, on: bool) -> OneFrame:
        self.vae.requires_grad_(on)
        return self


def new_autoencoder(recipe: QwenAutoencoderRecipe) -> AutoencoderKLQwenImage:
    """Untrained, with the configuration keys of Qwen-Image; nothing in it reaches into other frames."""
    vae = AutoencoderKLQwenImage(
        base_dim=recipe.base_width, z_dim=CHANNELS, dim_mult=list(recipe.width_factors), num_res_blocks=1
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 5 and parameter.shape[2] == 3:
                parameter[:, :, :2] = 0  # of earlier frames
            if "time_conv" in name:
                parameter.zero_()
    for module in vae.modules():
        if isinstance(module, QwenImageResidualBlock):  # starts as the identity
            torch.nn.init.zeros_(module.conv2.weight)
    return vae


def train_qwen_autoencoder(world: World, recipe: QwenAutoencoderRecipe) -> AutoencoderKLQwenImage:
    """Train on [-1, 1] pictures and set the mean and deviation of every latent channel."""
    torch.manual_seed(recipe.seed)
    vae = new_autoencoder(recipe)
    fit_autoencoder("Qwen-Image autoencoder", OneFrame(vae), world, recipe)
    fix_posterior(vae)
    moments = encode(vae, world.images(torch.arange(512)))
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in moments.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in moments.std((0, 2, 3)).tolist()],
    )
    return vae


def beside_twins(world: World, split: str, seed: int) -> World:
    """Each picture of ``load_world(split, seed, ...)`` with its twin, (N, 6, 64, 64): the same objects in any hue, on the same background."""
    twins = np.empty((len(world), 3, SIDE_PX, SIDE_PX), np.uint8)
    for index, scene in enumerate(world.scenes):
        placed, background = place(scene, rng_for(split, seed, index, stream=1))
        rng = rng_for(split, seed, index, stream=2)
        hues = [replace(one, rgb=hsv_to_rgb(rng.uniform(), *rng.uniform((0.7, 0.65), (0.9, 1.0)))) for one in placed]
        twins[index] = (paint(hues, background) * 255 + 0.5).transpose(2, 0, 1)
    return replace(world, pictures=torch.cat([world.pictures, torch.from_numpy(twins)], dim=1))


def train_recoloured(vae: AutoencoderKLQwenImage, twins: World, recipe: RecolouredRecipe) -> AutoencoderKLQwenImage:
    """Go on with some pictures by their twins; latents of the others stay, so mean and deviation do."""
    before = OneFrame(copy.deepcopy(vae)).requires_grad_(False)

    def loss(frame: Any, x: Tensor, g: torch.Generator, recipe: RecolouredRecipe) -> Tensor:
        count = int(recipe.recoloured_share * len(x))
        plain, hued = x[count:, :3], x[:count, 3:]
        with torch.no_grad():
            wanted = before.encode(plain).latent_dist.mean
        moved = (frame.encode(plain).latent_dist.mean - wanted).square().mean()
        return autoencoder_loss(frame, torch.cat([hued, plain]), g, recipe) + recipe.anchor_weight * moved

    fit_autoencoder("Qwen-Image autoencoder, twins", OneFrame(vae.requires_grad_(True)), twins, recipe, loss)
    fix_posterior(vae)
    return vae


def fix_posterior(vae: AutoencoderKLQwenImage) -> None:
    """Make the posterior's width a constant."""
    with torch.no_grad():
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = -8.0


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> raw latents (B, 16, H/8, W/8)."""
    frame = OneFrame(vae)
    return torch.cat([frame.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)])


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Raw latents -> pictures in [0, 1]."""
    frame = OneFrame(vae)
    return (torch.cat([frame.decode(part).sample for part in latents.split(64)]) / 2 + 0.5).clamp(0, 1)


def measure(folder: Path, judged: World) -> dict[str, float]:
    """Share of reconstructions that the oracle still reads right, also from slightly noisy latents."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)
    latents = encode(vae, judged.images(torch.arange(len(judged))))
    noise = 0.1 * torch.randn(latents.shape, generator=generator(0, 0)) * latents.std((0, 2, 3), keepdim=True)
    return {
        "oracle on reconstructions": retention(decode(vae, latents), judged.captions),
        "oracle with latent noise 0.1": retention(decode(vae, latents + noise), judged.captions),
    }
