"""Guidance distilled into the number that FLUX.1-dev is told (arXiv 2210.03142): one call gives what two gave.

Shapes: B rows; latents (B, 16, 8, 8); t and w are (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from shapes.parallel import WORKERS, fit
from shapes.world import World, batch_index, generator
from train_t2i.families import Cond, load_family
from train_t2i.families.base import classifier_free

UNGUIDED = 1.0  # what the network was told while it learned to denoise


@dataclass(frozen=True)
class GuidanceRecipe:
    """How the distillation is done."""

    seed: int = 54
    pictures: int = 4096
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 3e-4
    most: float = 5.0  # guidance is drawn from 1 to this


def distil_guidance(start: Path, folder: Path, world: World, recipe: GuidanceRecipe, text_length: int) -> None:
    """The transformer in `start`, told w, learns the guided output of itself told 1; into the pipeline `folder` in half precision.

    `start` is not the pipeline's own: a second run would guide what is guided already.
    """
    family: Any = load_family("flux", str(folder), size_px=(64, 64), text_length=text_length, guidance=UNGUIDED)
    teacher, student = (FluxTransformer2DModel.from_pretrained(start, dtype=torch.float32) for _ in range(2))
    teacher.eval().requires_grad_(False)
    student.eval().requires_grad_(True)
    conds, latents = encoded(family, world, recipe.pictures)

    def loss(part: tuple[Tensor, torch.Generator]) -> Tensor:
        index, g = part
        cond = rows_of(conds, index)
        noise = torch.randn(latents[index].shape, generator=g)
        t, unit = torch.rand(2, len(index), generator=g)
        w = 1 + (recipe.most - 1) * unit
        x_t = family.path.add_noise(latents[index], noise, t)
        with torch.no_grad():
            both = family.call(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), cond.with_negative())
            negative, positive = both.chunk(2)
        told = family.told_guidance(cond, w)
        return F.mse_loss(family.call(student, x_t, t, told), classifier_free(positive, negative, w))

    def parts(step: int) -> list[tuple[Tensor, torch.Generator]]:
        index = batch_index(recipe.seed, step, recipe.batch_size, recipe.pictures)
        return [(part, generator(recipe.seed, step, 1 + i)) for i, part in enumerate(index.chunk(WORKERS))]

    fit("guidance", loss, parts, list(student.parameters()), recipe.steps, recipe.learning_rate)
    student.half().save_pretrained(folder / "transformer")


@torch.no_grad()
def encoded(family: Any, world: World, count: int, batch: int = 64) -> tuple[Cond, Tensor]:
    """Conditionings and latents of the first pictures."""
    conds, latents = [], []
    for first in range(0, count, batch):
        index = torch.arange(first, min(first + batch, count))
        conds.append(family.encode([world.captions[i] for i in index.tolist()], ""))
        latents.append(family.to_latents(world.images(index)))
    return Cond.cat(conds), torch.cat(latents)


def rows_of(cond: Cond, index: Tensor) -> Cond:
    """Some rows of a conditioning."""

    def taken(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[index]

    negative = None if cond.negative is None else rows_of(cond.negative, index)
    return Cond(cond.tokens[index], taken(cond.pooled), taken(cond.mask), negative, taken(cond.guidance))
