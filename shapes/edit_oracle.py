"""Says whether an edit was done, and whether the rest was left alone: from the pictures and the instruction, without a network.

from shapes.edit_oracle import edit_adherence      # (B,3,H,W) in [0,1], instructions, sources -> (B,) of 0 or 1
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shapes.edit_pictures import Picture, edited
from shapes.edits import follow, parse
from shapes.oracle import Reading, read
from shapes.render import BACKGROUND_RGB, COLOUR_RGB, SIDE_PX, Placed, coverage
from shapes.scenes import Scene

RIM_PX = 2.0  # pixels this near to an outline are neither of the object nor surely of the background


def _side(image: Tensor) -> Tensor:
    """(3, H, W) -> (3, 64, 64), as the oracle sees it."""
    x = image.detach().float().cpu()
    return x if x.shape[-2:] == (SIDE_PX, SIDE_PX) else F.interpolate(x[None], (SIDE_PX, SIDE_PX), mode="area")[0]


def _read_sources(sources: Sequence[Sequence[Tensor]]) -> list[list[Reading]]:
    """What every source of every row shows."""
    flat = [_side(image) for row in sources for image in row]
    readings = iter(read(torch.stack(flat)) if flat else ())
    return [[next(readings) for _ in row] for row in sources]


def _wanted(prompt: str, readings: Sequence[Reading]) -> Scene | None:
    """The scene that is asked for; None where the sources do not say."""
    parse(prompt)  # another text is a mistake of the caller
    scenes = [reading.scene for reading in readings if reading.scene is not None]
    try:
        return follow(prompt, scenes) if len(scenes) == len(readings) else None
    except ValueError:  # the prompt names what the sources do not show
        return None


def _counted(images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Tensor]]) -> None:
    if not len(images) == len(prompts) == len(sources):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts and the sources of {len(sources)}")


def edit_adherence(images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Tensor]]) -> Tensor:
    """1 where the picture shows what the instruction makes of its sources, in every attribute, else 0.

    A row whose sources show no scene, or not what its instruction names, gets 0.

    Args:
        images: (B, 3, H, W) in [0, 1].
        prompts: B edit instructions of this world.
        sources: B lists of source pictures (3, h, w) in [0, 1], any sizes.
    Returns:
        (B,) float32 on the CPU.
    Raises:
        ValueError: a prompt is not an edit instruction of this world, or the counts differ.
    """
    _counted(images, prompts, sources)
    wanted = [_wanted(prompt, readings) for prompt, readings in zip(prompts, _read_sources(sources))]
    hits = [scene is not None and reading.scene == scene for reading, scene in zip(read(images), wanted)]
    return torch.tensor(hits, dtype=torch.float32)


def _picture(reading: Reading) -> Picture:
    """The geometry that a reading found, in the order of its scene."""
    assert reading.scene is not None
    found = sorted(reading.found, key=lambda one: reading.scene.things.index(one.thing))  # type: ignore[union-attr]
    placed = [Placed(one.thing.shape, one.x, one.y, one.radius, COLOUR_RGB[one.thing.colour]) for one in found]
    return Picture(reading.scene, tuple(placed), BACKGROUND_RGB[reading.scene.background])


def kept(source: Reading, target: Scene) -> Tensor:
    """(64, 64) bool: the pixels that this edit of one picture has no business with.

    That is all beyond the changed objects, where they are and where they come to be; if the background changes, the objects.
    """
    before = _picture(source)
    after = edited([before], target)
    if before.background != after.background:
        inside = [coverage(p.shape, p.x, p.y, p.radius - RIM_PX) == 1 for p in before.placed]
        return torch.from_numpy(np.any(inside, axis=0))
    changed = {*before.placed} ^ {*after.placed}
    beside = [coverage(p.shape, p.x, p.y, p.radius + RIM_PX) == 0 for p in changed]
    return torch.from_numpy(np.all([np.ones((SIDE_PX, SIDE_PX), bool), *beside], axis=0))


def untouched(images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Tensor]]) -> Tensor:
    """How far a picture departs from its source where the instruction asks for nothing: 0 is best.

    Args:
        images, prompts, sources: as for ``edit_adherence``.
    Returns:
        (B,) float32 on the CPU, mean absolute difference of those pixels in [0, 1]; NaN for a composition, all of whose pixels
        may change, and where the sources do not say which pixels.
    Raises:
        ValueError: as ``edit_adherence``.
    """
    _counted(images, prompts, sources)
    told = []
    for image, prompt, pictures, readings in zip(images, prompts, sources, _read_sources(sources)):
        target = _wanted(prompt, readings)
        if target is None or len(readings) > 1:
            told.append(torch.tensor(float("nan")))
        else:
            apart = (_side(image) - _side(pictures[0])).abs().mean(0)
            told.append(apart[kept(readings[0], target)].mean())
    return torch.stack(told) if told else torch.empty(0)
