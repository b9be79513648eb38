"""Ways to spoil a picture.  Light ones leave its meaning (the towers must not mind them); heavy ones make mush (they must).

Everything takes (B, 3, 64, 64) in [0, 1] and a generator, and returns the same shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Generator = torch.Generator


def _uniform(x: Tensor, low: float, high: float, g: Generator) -> Tensor:
    """(B, 1, 1, 1): one number a picture."""
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=g)


def soften(x: Tensor, size_px: int) -> Tensor:
    """Throw away detail finer than 64 / size_px px."""
    small = F.interpolate(x, (size_px, size_px), mode="area")
    return F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)


def smooth(x: Tensor) -> Tensor:
    """A binomial blur three pixels wide."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4


def light(x: Tensor, g: Generator) -> Tensor:
    """A little colour, blur and noise: the caption and the quality stay."""
    gain = 1 + 0.05 * (2 * torch.rand(len(x), 3, 1, 1, generator=g) - 1)
    shift = 0.03 * (2 * torch.rand(len(x), 3, 1, 1, generator=g) - 1)
    x = x * gain + shift
    x = x.lerp(smooth(x), _uniform(x, 0.0, 0.7, g))
    return (x + _uniform(x, 0.0, 0.04, g) * torch.randn(x.shape, generator=g)).clamp(0, 1)


def warp(x: Tensor, g: Generator, low: float = 0.08, high: float = 0.25) -> Tensor:
    """Bend the picture by a smooth random field; low, high: strength in half pictures."""
    field = F.interpolate(torch.randn(len(x), 2, 8, 8, generator=g), 64, mode="bicubic").permute(0, 2, 3, 1)
    axis = torch.linspace(-1, 1, 64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]
    strength = _uniform(x, low, high, g)
    return F.grid_sample(x, grid + strength * field, padding_mode="border", align_corners=True)


def _side(x: Tensor, g: Generator) -> Tensor:
    """(B, 1, 64, 64) bool: one half of each picture, cut across or along at random."""
    ramp = torch.arange(64)
    halves = torch.stack([ramp[None].expand(64, 64) < 32, ramp[:, None].expand(64, 64) < 32])
    pick = torch.randint(0, 2, (len(x),), generator=g)
    flip = torch.rand(len(x), 1, 1, 1, generator=g) < 0.5
    return halves[pick][:, None] ^ flip


def erase(x: Tensor, g: Generator) -> Tensor:
    """Paint half of the picture with its background: an object goes missing or is cut."""
    return torch.where(_side(x, g), x[..., :1, :1], x)


def splice(x: Tensor, g: Generator) -> Tensor:
    """One half of this picture beside one half of another."""
    return torch.where(_side(x, g), x.roll(1, 0), x)


def ghost(x: Tensor, g: Generator) -> Tensor:
    """Two pictures through each other."""
    return x.lerp(x.roll(1, 0), _uniform(x, 0.25, 0.5, g))


def twin(x: Tensor, g: Generator) -> Tensor:
    """The objects twice: the picture over a shifted copy of itself, the stronger contrast wins."""
    dy, dx = (int(v) for v in torch.randint(14, 30, (2,), generator=g) * torch.tensor([1, -1]))
    back = x[..., :1, :1]
    other = x.roll((dy, dx), (2, 3))
    return torch.where((x - back).abs().sum(1, keepdim=True) > (other - back).abs().sum(1, keepdim=True), x, other)


def blocky(x: Tensor, g: Generator) -> Tensor:
    """Coarse tiles and steps between them, as a broken decoder makes."""
    tile = int(torch.randint(3, 6, (1,), generator=g))
    flat = F.avg_pool2d(x, tile, ceil_mode=True, count_include_pad=False)
    flat = F.interpolate(flat, scale_factor=tile, mode="nearest")[..., :64, :64]
    steps = F.interpolate(torch.randn(len(x), 3, 8, 8, generator=g), 64, mode="nearest")
    return (x.lerp(flat, _uniform(x, 0.4, 1.0, g)) + _uniform(x, 0.02, 0.08, g) * steps).clamp(0, 1)


def blurred(x: Tensor, g: Generator) -> Tensor:
    """Too soft to tell shapes."""
    return soften(x, int(torch.randint(9, 20, (1,), generator=g)))


def noisy(x: Tensor, g: Generator) -> Tensor:
    """Grain, or coloured clouds."""
    fine = torch.randn(x.shape, generator=g)
    side = int(torch.randint(6, 33, (1,), generator=g))
    cloud = F.interpolate(torch.randn(len(x), 3, side, side, generator=g), 64, mode="bilinear")
    return (x + _uniform(x, 0.08, 0.25, g) * torch.where(_uniform(x, 0, 1, g) < 0.5, fine, cloud)).clamp(0, 1)


def washed(x: Tensor, g: Generator) -> Tensor:
    """Contrast gone, or pushed until the colours clip."""
    factor = torch.where(_uniform(x, 0, 1, g) < 0.5, _uniform(x, 0.2, 0.6, g), _uniform(x, 1.6, 2.5, g))
    centre = x.mean((2, 3), keepdim=True)
    return (centre + factor * (x - centre)).clamp(0, 1)


WRONG = (erase, splice, twin)  # sharp pictures that no longer fit the caption
POOR = (warp, ghost, blocky, blurred, noisy, washed)  # the content may still be guessed, but nobody would want it


def _spoil(x: Tensor, g: Generator, ways: tuple) -> Tensor:
    """Each picture in one way drawn at random."""
    order = torch.randperm(len(x), generator=g)
    out = x.clone()
    for way, rows in zip(ways, order.chunk(len(ways))):
        if len(rows):
            out[rows] = way(x[rows], g)
    return out


def wrong(x: Tensor, g: Generator) -> Tensor:
    """Sharp, but objects missing, foreign or doubled."""
    return _spoil(x, g, WRONG)


def poor(x: Tensor, g: Generator) -> Tensor:
    """Bent, doubled, blocky, blurred, noisy or washed out."""
    return _spoil(x, g, POOR)
