"""What the last states of the edit encoder say: the wanted scene, an object a state.

The transformer binds what it reads by attention.  A state that is one object, its place included, is found by the picture's tokens of
that place; one state for everything has to be taken apart there: docs/supervised.md has what that costs.
Shapes: N edits, S states, F facts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shapes.render import COLOUR_RGB
from shapes.scenes import BACKGROUNDS, POSITIONS, SHAPES, SIZES, Scene

SAID = (0, 1, None, 0, 1)  # which object each state after the text is; None: the background
PLACES = {"left of": ("left", "right"), "above": ("top", "bottom")}
NAMED = (SIZES, SHAPES, POSITIONS, BACKGROUNDS)
SPANS = tuple(len(words) for words in (*NAMED, "rgb"))  # of the facts of a state
LOUDNESS = 5.0  # of a fact; a state of the encoder is about 10 long


def _one_of(words: Sequence[str], word: str | None) -> list[float]:
    return [float(each == word) for each in words]


def facts(scene: Scene, rgb: Tensor) -> Tensor:
    """(S, F) of a scene whose objects have the colours `rgb` (2, 3) in [0, 1]; an only object is said twice."""
    said = []
    for which in SAID:
        if which is None:
            words: tuple[str | None, ...] = (None, None, None, scene.background)
            colour = [0.0] * 3
        else:
            at = min(which, len(scene.things) - 1)
            place = scene.position or PLACES[scene.relation or ""][at]
            words = (scene.things[at].size, scene.things[at].shape, place, None)
            colour = (2 * rgb[at] - 1).tolist()
        said.append([*(v for names, word in zip(NAMED, words) for v in _one_of(names, word)), *colour])
    return torch.tensor(said)


def directions(width: int, seed: int) -> Tensor:
    """(F, D): a direction for each fact, at right angles to the others."""
    g = torch.Generator().manual_seed(seed)
    return LOUDNESS * torch.linalg.qr(torch.randn(width, sum(SPANS), generator=g)).Q.T


def right(states: Tensor, wanted: Tensor, ways: Tensor) -> Tensor:
    """(N,) bool: whether `states` (N, S, D) say the facts `wanted` (N, S, F) along `ways` (F, D), a colour by its nearest name."""
    said = (states @ ways.T / LOUDNESS**2).split(SPANS, -1)
    named = [
        (found.argmax(-1) == word.argmax(-1)) | (word == 0).all(-1)
        for found, word in zip(said[:-1], wanted.split(SPANS, -1)[:-1])
    ]
    table = 2 * torch.tensor(list(COLOUR_RGB.values())) - 1
    objects = torch.tensor([which is not None for which in SAID])

    def name(colours: Tensor) -> Tensor:
        return torch.cdist(colours.reshape(-1, 3), table).argmin(1).view(colours.shape[:2])

    colour = name(said[-1]) == name(wanted[..., -3:])
    return torch.stack([*named, colour | ~objects]).all(0).all(1)
