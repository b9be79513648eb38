"""From an image of any size to a tower's input, in differentiable operations.

Shapes: B batch, H and W the image's own height and width in px, h and w the tower's.
The three ways are those of open_clip (``squash``, ``longest``, ``shortest``); resizing is antialiased, as in PIL, which
every published preprocessing goes through.  Unlike PIL nothing is rounded to 8 bits or clamped: it has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import Choices, ResizeMode

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """How images become a tower's input; the values of open_clip's ``preprocess_cfg``."""

    size_px: tuple[int, int]  # height, width
    resize_mode: ResizeMode
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"  # or bilinear
    fill: float = 0.0  # what pads, on the scale of the pixels (0..1), before normalisation
    antialias: bool = True
    centre: Literal["round", "floor"] = "round"  # of a crop of odd excess: torchvision's way, transformers' way

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, h, w), normalised."""
        if self.resize_mode == "squash":
            images = self._resize(images, self.size_px)
        elif self.resize_mode == "longest":
            images = self._fit_inside(images)
        else:
            images = self._fill_and_crop(images)
        made = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (self.mean, self.std))
        mean, std = (values.to(images.device, non_blocking=True) for values in made)  # new_tensor waits for the device
        return (images - mean) / std

    def chosen(self, choices: Choices) -> Preprocess:
        """With the user's choices in place of the official ways."""
        antialias = self.antialias if choices.antialias is None else choices.antialias
        return replace(self, antialias=antialias, resize_mode=choices.resize_mode or self.resize_mode)

    def told(self) -> dict[str, str]:
        """What a report says of it."""
        return {"resize": self.resize_mode, "antialias": "antialiased" if self.antialias else "not antialiased"}

    def _resize(self, images: Tensor, size_px: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) -> (B, 3, h, w); the aspect ratio gives way."""
        if tuple(images.shape[-2:]) == size_px:
            return images
        how = self.interpolation
        return functional.interpolate(images, size_px, mode=how, antialias=self.antialias, align_corners=False)

    def _fit_inside(self, images: Tensor) -> Tensor:
        """The longest side to the tower's, the rest padded with ``fill``, centred: HPSv2's ``ResizeMaxSize``."""
        height, width = images.shape[-2:]
        ratio = max(height / self.size_px[0], width / self.size_px[1])
        images = self._resize(images, (max(1, round(height / ratio)), max(1, round(width / ratio))))
        gap_y, gap_x = self.size_px[0] - images.shape[-2], self.size_px[1] - images.shape[-1]
        return functional.pad(images, (gap_x // 2, gap_x - gap_x // 2, gap_y // 2, gap_y - gap_y // 2), value=self.fill)

    def _fill_and_crop(self, images: Tensor) -> Tensor:
        """The shortest side to the tower's, the rest cut off on both sides (torchvision's Resize and CenterCrop)."""
        (height, width), wanted = images.shape[-2:], self.size_px
        if height / wanted[0] <= width / wanted[1]:
            size = (wanted[0], max(wanted[1], int(wanted[0] * width / height)))
        else:
            size = (max(wanted[0], int(wanted[1] * height / width)), wanted[1])
        images = self._resize(images, size)
        excess = (size[0] - wanted[0], size[1] - wanted[1])
        top, left = (round(gap / 2) if self.centre == "round" else gap // 2 for gap in excess)
        return images[..., top : top + wanted[0], left : left + wanted[1]]
