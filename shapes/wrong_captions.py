"""Captions for the towers: those of the world, tokenised, and ones that are wrong in exactly one attribute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUM_TEMPLATES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    has_held_out_pair,
)
from shapes.text_encoders import attributes
from shapes.tokenizer import new_tokenizer
from shapes.world import World

CONTEXT = 32  # tokens; the longest caption has 25


def mutate(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in exactly one attribute; never one with a held-out pair, which would teach that those are wrong."""
    while True:
        other = _changed(scene, rng)
        if other != scene and not has_held_out_pair(other):
            return other


def _other(options: tuple[str, ...], now: str, rng: np.random.Generator) -> str:
    rest = [option for option in options if option != now]
    return rest[int(rng.integers(len(rest)))]


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    what = int(rng.integers(6))
    if what == 0:
        return replace(scene, background=_other(BACKGROUNDS, scene.background, rng))
    if what == 1 and scene.position:
        return replace(scene, position=_other(POSITIONS, scene.position, rng))
    if what == 1:
        turned = replace(scene, relation=_other(RELATIONS, scene.relation or "", rng))
        return turned if rng.random() < 0.5 else replace(scene, things=scene.things[::-1])
    if what == 2 and len(scene.things) == 2:  # the attributes of the two objects change places
        a, b = scene.things
        field = ("size", "colour", "shape")[int(rng.integers(3))]
        swapped = (replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)}))
        return replace(scene, things=swapped)
    slot = int(rng.integers(len(scene.things)))
    thing = scene.things[slot]
    field, options = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))[int(rng.integers(3))]
    new = replace(thing, **{field: _other(options, getattr(thing, field), rng)})
    things = tuple(new if i == slot else old for i, old in enumerate(scene.things))
    return replace(scene, things=things)


class Captions:
    """Tokenised captions: those of the world, and wrong ones on demand."""

    def __init__(self, world: World) -> None:
        self.tokenizer = new_tokenizer(CONTEXT)
        self.scenes = world.scenes
        self.ids = self.encode(world.captions)
        self.labels = torch.tensor([attributes(scene) for scene in world.scenes])

    def encode(self, texts: list[str]) -> Tensor:
        """Texts -> (N, CONTEXT)."""
        out = self.tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
        return out.input_ids

    def wrong(self, index: Tensor, count: int, seed: int, step: int) -> Tensor:
        """(B,) -> (B * count, CONTEXT): captions that are wrong in one attribute."""
        rng = np.random.default_rng([seed, step, 7])
        near = [mutate(self.scenes[int(i)], rng) for i in index for _ in range(count)]
        return self.encode([caption(scene, int(rng.integers(NUM_TEMPLATES))) for scene in near])
