"""Edits of objects of any colour.

A network that sees six colours alone learns which shapes never come in which, and takes a held-out pair for one that it knows.
Colours in between take that knowledge away, and show no held-out pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shapes.edit_pictures import RGB, Drawn, Picture, draw, edited, painted, pictures
from shapes.edits import Edit, follow, parse, sample
from shapes.render import COLOUR_RGB
from shapes.scenes import HELD_OUT_PAIRS, rng_for

APART = 0.35  # colour units between a free colour and its background, or the colour of a held-out pair


def _far(one: RGB, other: RGB) -> bool:
    return float(np.linalg.norm(np.subtract(one, other))) >= APART


def _allowed(shape: str, rgb: RGB) -> bool:
    return all(_far(rgb, COLOUR_RGB[colour]) for held_out, colour in HELD_OUT_PAIRS if held_out == shape)


def exact_target(sources: Sequence[Picture], edit: Edit) -> Picture:
    """The edited picture, a new colour without the old one's departure from its name."""
    made, old = edited(sources, edit.target), {thing.colour for scene in edit.sources for thing in scene.things}
    exact = (
        placed if thing.colour in old else replace(placed, rgb=COLOUR_RGB[thing.colour])
        for thing, placed in zip(edit.target.things, made.placed)
    )  # fmt: skip
    return replace(made, placed=tuple(exact))


def freely_coloured(edit: Edit, sources: Sequence[Picture], rng: np.random.Generator) -> list[Picture]:
    """The same sources with objects of any colours; as they are where the instruction names a source's colour."""
    told = parse(edit.instruction)[1]
    if any(" " in told.get(name, "") for name in "ab"):
        return list(sources)
    while True:
        drawn = [
            replace(source, placed=tuple(replace(p, rgb=tuple(rng.uniform(0, 1, 3).tolist())) for p in source.placed))
            for source in sources
        ]
        seen = all(_far(p.rgb, picture.background) for picture in drawn for p in picture.placed)
        shown = [p for picture in (*drawn, exact_target(drawn, edit)) for p in picture.placed]
        named = set(COLOUR_RGB.values())
        if seen and all(p.rgb in named or _allowed(p.shape, p.rgb) for p in shown):
            return drawn


def without_colours(edit: Edit) -> Edit:
    """The same edit, the colours of its sources not told where its objects can be told apart without them."""
    told = parse(edit.instruction)[1]
    instruction = edit.instruction
    for name in (told[key] for key in "ab" if " " in (told.get(key) or "")):
        instruction = instruction.replace(f"the {name}", f"the {name.split()[-1]}")
    try:
        same = follow(instruction, edit.sources) == edit.target
    except ValueError:  # two of one shape
        return edit
    return replace(edit, instruction=instruction) if same else edit


def draw_free(split: str, seed: int, index: int, kinds: tuple[str, ...]) -> Drawn:
    """Like ``edit_pictures.draw``, every other edit of objects of any colour where it can be told without their names."""
    if index % 2 == 0:
        return draw(split, seed, index, kinds)
    edit = without_colours(sample(split, seed, index, kinds))
    sources = freely_coloured(
        edit, pictures(edit, rng_for(split, seed, index, stream=3))[0], rng_for(split, seed, index, stream=4)
    )
    return painted(edit, sources, exact_target(sources, edit))
