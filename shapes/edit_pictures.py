"""Pictures of edits: source and target are drawn from one geometry, in which only what the instruction touches changes.

A recoloured object keeps its place, radius and jitter of colour; a moved one its distance from the middle of the place; a swap
exchanges the middles; a composition takes objects and background from its sources and sets the objects side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shapes.edits import Edit, sample
from shapes.render import (
    ALONG_PX,
    BACKGROUND_RGB,
    CENTRES_PX,
    COLOUR_RGB,
    RADIUS_PX,
    SIDE_PX,
    Array,
    Placed,
    paint,
    place,
)
from shapes.scenes import Scene, Thing, rng_for

RGB = tuple[float, float, float]
Drawn = tuple[Edit, list[Array], Array]  # an edit with its source pictures and its target, each (64, 64, 3) uint8


@dataclass(frozen=True)
class Picture:
    """A scene with its exact geometry: `placed` in the order of the scene's objects, `background` in [0, 1]."""

    scene: Scene
    placed: tuple[Placed, ...]
    background: RGB

    def paint(self) -> Array:
        """(64, 64, 3) in [0, 1]."""
        return paint(list(self.placed), self.background)


def new_picture(scene: Scene, rng: np.random.Generator) -> Picture:
    placed, background = place(scene, rng)
    return Picture(scene, tuple(placed), background)


def _shifted(rgb: RGB, old: RGB, new: RGB) -> RGB:
    """Another named colour with the same jitter."""
    if old == new:
        return rgb
    r, g, b = np.clip(np.asarray(rgb) - old + new, 0, 1)
    return float(r), float(g), float(b)


def _altered(placed: Placed, old: Thing, new: Thing) -> Placed:
    scale = RADIUS_PX[new.size] / RADIUS_PX[old.size]
    rgb = _shifted(placed.rgb, COLOUR_RGB[old.colour], COLOUR_RGB[new.colour])
    return Placed(new.shape, placed.x, placed.y, placed.radius * scale, rgb)


def _composed(sources: Sequence[Picture], target: Scene) -> Picture:
    """Side by side, where the middle of the jitter is."""
    known = {thing: placed for source in sources for thing, placed in zip(source.scene.things, source.placed)}
    placed = []
    for thing, along in zip(target.things, ALONG_PX):
        across = SIDE_PX / 2
        x, y = (along, across) if target.relation == "left of" else (across, along)
        placed.append(replace(known[thing], x=x, y=y))
    return Picture(target, tuple(placed), sources[0].background)


def edited(sources: Sequence[Picture], target: Scene) -> Picture:
    """The picture of `target`, a scene that an instruction made of those of `sources`."""
    if len(sources) > 1:
        return _composed(sources, target)
    source = sources[0]
    old = source.scene
    background = _shifted(source.background, BACKGROUND_RGB[old.background], BACKGROUND_RGB[target.background])
    if len(old.things) > 1 and target.things == old.things[::-1]:
        first, second = source.placed
        swapped = (replace(second, x=first.x, y=first.y), replace(first, x=second.x, y=second.y))
        return Picture(target, swapped, background)
    placed = tuple(map(_altered, source.placed, old.things, target.things))
    if old.position is not None and old.position != target.position:
        assert target.position is not None
        (x, y), (new_x, new_y) = CENTRES_PX[old.position], CENTRES_PX[target.position]
        placed = (replace(placed[0], x=placed[0].x - x + new_x, y=placed[0].y - y + new_y),)
    return Picture(target, placed, background)


def pictures(edit: Edit, rng: np.random.Generator) -> tuple[list[Picture], Picture]:
    """The sources of an edit, their geometry drawn from `rng`, and its target."""
    sources = [new_picture(scene, rng) for scene in edit.sources]
    return sources, edited(sources, edit.target)


def draw(split: str, seed: int, index: int, kinds: tuple[str, ...]) -> Drawn:
    """Edit number `index` of a split with its pictures."""
    edit = sample(split, seed, index, kinds)
    return painted(edit, *pictures(edit, rng_for(split, seed, index, stream=3)))


def painted(edit: Edit, sources: Sequence[Picture], target: Picture) -> Drawn:
    return edit, [_bytes(source.paint()) for source in sources], _bytes(target.paint())


def _bytes(pixels: Array) -> Array:
    return (pixels * 255 + 0.5).astype(np.uint8)


def write_edits(
    split: str, count: int, seed: int, out: Path, kinds: tuple[str, ...], draw: Callable[..., Drawn] = draw
) -> None:
    """``source/``, ``target/`` and ``metadata.json``, whose paths start at `out`; where the table is, all is."""
    from PIL import Image

    for folder in ("source", "target"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        edit, sources, target = draw(split, seed, index, kinds)
        target_path = f"target/{index:06d}.png"
        source_paths = [f"source/{index:06d}_{number}.png" for number in range(1, len(sources) + 1)]
        for path, pixels in zip((target_path, *source_paths), (target, *sources)):
            Image.fromarray(pixels).save(out / path)
        rows.append(
            {"file_path": target_path, "source_file_path": source_paths, "text": edit.instruction, "type": "image"}
        )
    partial = out / "metadata.partial"
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / "metadata.json")
