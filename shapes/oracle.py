"""Says what a picture shows, by geometry and colour and without a network, and whether a caption fits it.

Analysis by synthesis: find the background and the blobs on it, explain each blob by the one shape that matches its soft
outline best, and accept that only if it fits.  Blur and light noise pass, since areas and centroids are soft moments; mush, stray
blobs and two-coloured objects do not.

    from shapes.oracle import adherence      # (B,3,H,W) in [0,1], prompts -> (B,) of 0 or 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shapes.render import AREA, BACKGROUND_RGB, CENTROID_DROP, COLOUR_RGB, RADIUS_PX, SIDE_PX, Array, coverage
from shapes.scenes import SHAPES, Scene, Thing, parse

# Thresholds, in [0, 1] colour units and px.
FOREGROUND = 0.16  # a pixel farther than this from the background belongs to something
NEAR_BACKGROUND, NEAR_COLOUR = 0.16, 0.24  # how far an estimated colour may be from the named one
SPECK_PX = 8  # blobs smaller than this are noise
STRAY_PX = 24  # more foreground than this outside the objects is something that should not be there
Mask = NDArray[np.bool_]
MISFIT = 0.24  # sum |alpha - shape| / area: an octagon is no circle
UNEVEN = 0.09  # mean distance of the inner pixels from the object's colour
SIZE_SPLIT_PX = (RADIUS_PX["small"] + RADIUS_PX["large"]) / 2
RADIUS_RANGE_PX = (0.75 * RADIUS_PX["small"], 1.25 * RADIUS_PX["large"])
CENTRE_PX = 7.5  # an object within this of the middle is in the centre


@dataclass(frozen=True)
class Found:
    """An object in a picture: what it is, the middle of its bounding box and its radius in px, how badly it fits."""

    thing: Thing
    x: float
    y: float
    radius: float
    misfit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows.  `scene` is None when that is no scene; `reason` then says why."""

    scene: Scene | None
    background: str | None
    found: tuple[Found, ...]
    reason: str = ""


def components(mask: Tensor) -> Tensor:
    """Label 8-connected regions.  (B, H, W) bool -> (B, H, W) int64; 0 outside, any distinct numbers inside."""
    h, w = mask.shape[-2:]
    inside = mask.float()[:, None]
    labels = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w) * inside
    for _ in range(h * w):
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * inside
        if torch.equal(spread, labels):
            break
        labels = spread
    return labels[:, 0].long()


def _nearest(rgb: Array, names: dict[str, tuple[float, float, float]], limit: float) -> str | None:
    distance = {name: float(np.linalg.norm(rgb - np.asarray(value))) for name, value in names.items()}
    best = min(distance, key=lambda name: distance[name])
    return best if distance[best] <= limit else None


def _background(image: Array) -> Array:
    """The colour of the frame: the median of the border, three pixels wide."""
    border = np.concatenate(
        [
            image[:3].reshape(-1, 3),
            image[-3:].reshape(-1, 3),
            image[3:-3, :3].reshape(-1, 3),
            image[3:-3, -3:].reshape(-1, 3),
        ]
    )
    return np.median(border, axis=0)


def _fit(alpha: Array) -> tuple[str, float, float, float, float]:
    """The shape whose outline is nearest to a soft mask (64, 64): (shape, x, y, radius, misfit).

    Radius and place follow from the mask's area and centroid, so there is nothing to search.
    """
    area = float(alpha.sum())
    rows, cols = np.mgrid[0:SIDE_PX, 0:SIDE_PX] + 0.5
    cx, cy = float((alpha * cols).sum() / area), float((alpha * rows).sum() / area)
    fits = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / AREA[shape]))
        y = cy - CENTROID_DROP[shape] * radius
        misfit = float(np.abs(alpha - coverage(shape, cx, y, radius)).sum() / area)
        fits.append((misfit, shape, cx, y, radius))
    misfit, shape, x, y, radius = min(fits)
    return shape, x, y, radius, misfit


def _read_object(image: Array, background: Array, blob: Mask, near: Mask) -> Found | str:
    """Explain one blob (its pixels; near: those and the soft rim).  A string says why it is no object."""
    distance = np.linalg.norm(image - background, axis=-1)
    core = blob & (distance >= 0.7 * np.quantile(distance[blob], 0.8))
    rgb = np.median(image[core], axis=0)
    colour = _nearest(rgb, COLOUR_RGB, NEAR_COLOUR)
    if colour is None:
        return "an object of no known colour"
    direction = rgb - background
    alpha = np.clip((image - background) @ direction / float(direction @ direction), 0.0, 1.0) * near
    alpha = np.where(alpha < 0.12, 0.0, alpha).astype(np.float32)  # noise far from the object would add up
    shape, x, y, radius, misfit = _fit(alpha)
    if misfit > MISFIT:
        return "an object of no known shape"
    if not RADIUS_RANGE_PX[0] <= radius <= RADIUS_RANGE_PX[1]:
        return "an object of no known size"
    inner = coverage(shape, x, y, radius - 1.5) > 0.5
    if float(np.linalg.norm(image - rgb, axis=-1)[inner].mean()) > UNEVEN * 1.7320508:
        return "an object of several colours"
    size = "small" if radius < SIZE_SPLIT_PX else "large"
    return Found(Thing(size, colour, shape), x, y, radius, misfit)


def _arrange(found: Sequence[Found], background: str) -> Scene | None:
    """Name the layout of one or two objects; None when it is neither a position nor a relation."""
    if len(found) == 1:
        dx, dy = found[0].x - SIDE_PX / 2, found[0].y - SIDE_PX / 2
        if max(abs(dx), abs(dy)) < CENTRE_PX:
            position = "centre"
        elif abs(dx) > abs(dy):
            position = "left" if dx < 0 else "right"
        else:
            position = "top" if dy < 0 else "bottom"
        return Scene((found[0].thing,), background, position=position)
    a, b = found
    dx, dy = b.x - a.x, b.y - a.y
    if abs(abs(dx) - abs(dy)) < 4:  # a diagonal pair is both and neither
        return None
    relation = "left of" if abs(dx) > abs(dy) else "above"
    swap = (dx if relation == "left of" else dy) < 0
    things = (b.thing, a.thing) if swap else (a.thing, b.thing)
    return Scene(things, background, relation=relation)


def _read_one(image: Array, labels: np.ndarray, background: Array) -> Reading:
    """Read one picture (64, 64, 3) whose foreground is already labelled."""
    name = _nearest(background, BACKGROUND_RGB, NEAR_BACKGROUND)
    ids, counts = np.unique(labels[labels > 0], return_counts=True)
    blobs = [labels == i for i, n in zip(ids, counts) if n >= SPECK_PX]
    if name is None:
        return Reading(None, None, (), "a background of no known colour")
    if not 1 <= len(blobs) <= 2:
        return Reading(None, name, (), f"{len(blobs)} objects")
    found: list[Found] = []
    explained = np.zeros((SIDE_PX, SIDE_PX), bool)
    for blob in blobs:
        near = F.max_pool2d(torch.from_numpy(blob).float()[None, None], 5, stride=1, padding=2)[0, 0].numpy() > 0
        one = _read_object(image, background, blob, near)
        if isinstance(one, str):
            return Reading(None, name, tuple(found), one)
        found.append(one)
        explained |= coverage(one.thing.shape, one.x, one.y, one.radius + 2.0) > 0
    if int((labels.astype(bool) & ~explained).sum()) > STRAY_PX:
        return Reading(None, name, tuple(found), "something beside the objects")
    scene = _arrange(found, name)
    return Reading(scene, name, tuple(found), "" if scene else "neither left of nor above")


@torch.no_grad()
def read(images: Tensor) -> list[Reading]:
    """Say what each picture shows.  images: (B, 3, H, W) in [0, 1]; other sizes than 64 px are resampled by area."""
    x = images.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    if x.shape[-2:] != (SIDE_PX, SIDE_PX):
        x = F.interpolate(x, (SIDE_PX, SIDE_PX), mode="area")
    pictures = x.permute(0, 2, 3, 1).contiguous().numpy()
    backgrounds = [_background(p) for p in pictures]
    distance = np.stack([np.linalg.norm(p - b, axis=-1) for p, b in zip(pictures, backgrounds)])
    # A 3x3 mean keeps single noisy pixels from joining or making blobs.
    smooth = F.avg_pool2d(torch.from_numpy(distance)[:, None].float(), 3, stride=1, padding=1, count_include_pad=False)[
        :, 0
    ]
    labels = components(smooth > FOREGROUND).numpy()
    return [_read_one(p, one, b.astype(np.float32)) for p, one, b in zip(pictures, labels, backgrounds)]


def adherence(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where every attribute of the caption is what the picture shows, else 0.

    Args:
        images: (B, 3, H, W) in [0, 1].
        prompts: B captions of this world; words after a caption are ignored.
    Returns:
        (B,) float32 on the CPU.
    Raises:
        ValueError: a prompt is not a caption of this world.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    wanted = [parse(prompt) for prompt in prompts]
    return torch.tensor([float(reading.scene == scene) for reading, scene in zip(read(images), wanted)])
