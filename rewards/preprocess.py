"""From an image of any size to a tower's input, in differentiable operations.

Shapes: B batch, H and W the image's own height and width in px, h and w the tower's.
The three ways are those of open_clip (``squash``, ``longest``, ``shortest``); resizing is antialiased, as in PIL, which
every published preprocessing goes through.  Unlike PIL nothing is rounded to 8 bits or clamped: it has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
ResizeMode = Literal["squash", "longest", "shortest"]


@dataclass(frozen=True)
class Preprocess:
    """How images become a tower's input; the values of open_clip's ``preprocess_cfg``."""

    size_px: tuple[int, int]  # height, width
    resize_mode: ResizeMode
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"  # or bilinear
    fill: float = 0.0  # what pads, on the scale of the pixels (0..1), before normalisation

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, h, w), normalised."""
        if self.resize_mode == "squash":
            images = resize(images, self.size_px, self.interpolation)
        elif self.resize_mode == "longest":
            images = fit_inside(images, self.size_px, self.interpolation, self.fill)
        else:
            images = fill_and_crop(images, self.size_px, self.interpolation)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def resize(images: Tensor, size_px: tuple[int, int], interpolation: str) -> Tensor:
    """(B, 3, H, W) -> (B, 3, h, w), antialiased; the aspect ratio gives way."""
    if tuple(images.shape[-2:]) == size_px:
        return images
    return functional.interpolate(images, size=size_px, mode=interpolation, antialias=True, align_corners=False)


def fit_inside(images: Tensor, size_px: tuple[int, int], interpolation: str, fill: float) -> Tensor:
    """The longest side to the tower's, the rest padded with ``fill``, centred: HPSv2's ``ResizeMaxSize``."""
    height, width = images.shape[-2:]
    ratio = max(height / size_px[0], width / size_px[1])
    images = resize(images, (max(1, round(height / ratio)), max(1, round(width / ratio))), interpolation)
    gap_y, gap_x = size_px[0] - images.shape[-2], size_px[1] - images.shape[-1]
    return functional.pad(images, (gap_x // 2, gap_x - gap_x // 2, gap_y // 2, gap_y - gap_y // 2), value=fill)


def fill_and_crop(images: Tensor, size_px: tuple[int, int], interpolation: str) -> Tensor:
    """The shortest side to the tower's, the rest cut off on both sides (torchvision's Resize and CenterCrop)."""
    height, width = images.shape[-2:]
    if height / size_px[0] <= width / size_px[1]:
        size = (size_px[0], max(size_px[1], int(size_px[0] * width / height)))
    else:
        size = (max(size_px[0], int(size_px[1] * height / width)), size_px[1])
    images = resize(images, size, interpolation)
    top, left = (round((size[axis] - size_px[axis]) / 2) for axis in (0, 1))
    return images[..., top : top + size_px[0], left : left + size_px[1]]
