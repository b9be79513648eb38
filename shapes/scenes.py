"""Captioned scenes of the embedded world: what there is to say, how it is said, and what is kept for evaluation.

A scene is one or two plain shapes on a muted background.  Its caption names every attribute, so that
``parse(caption(scene)) == scene`` and a picture can be judged without opinion (see ``oracle.py``).
Everything is a function of (split, seed, index).

    python -m shapes.scenes prompts --split heldout --count 500 --seed 0 --out prompts.txt
    python -m shapes.scenes render --split train --count 2000 --seed 0 --out DIR
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
BACKGROUNDS = ("grey", "beige", "navy", "brown")
POSITIONS = ("left", "right", "centre", "top", "bottom")
RELATIONS = ("left of", "above")
SPLITS = ("train", "heldout", "eval")

# (shape, colour) pairs that no training picture shows.  Every shape and every colour stays common in training.
HELD_OUT_PAIRS = frozenset({("circle", "purple"), ("square", "yellow"), ("triangle", "red"), ("cross", "cyan")})
HELD_OUT_SHARE = 0.4  # of the `heldout` prompts; the rest are unseen combinations of trained pairs
TWO_OBJECT_SHARE = 0.6


@dataclass(frozen=True)
class Thing:
    """One object: its size, colour and shape."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says.  One object has a `position`; of two, the first is left of or above the second (`relation`)."""

    things: tuple[Thing, ...]
    background: str
    position: str | None = None
    relation: str | None = None


# ------------------------------------------------------------------ captions
_WHERE = {
    "left": "on the left",
    "right": "on the right",
    "centre": "in the centre",
    "top": "at the top",
    "bottom": "at the bottom",
}
_FORWARD = {"left of": "to the left of", "above": "above"}
_REVERSE = {"left of": "to the right of", "above": "below"}
_ONE = (
    "a {a} {where} on a {bg} background",
    "a {bg} background with a {a} {where}",
    "{where}, a {a}, {bg} background",
    "on a {bg} background there is a {a} {where}",
)
_TWO = (
    "a {a} {forward} a {b} on a {bg} background",
    "a {b} {reverse} a {a} on a {bg} background",
    "a {bg} background with a {a} {forward} a {b}",
    "on a {bg} background, a {b} is {reverse} a {a}",
)
NUM_TEMPLATES = 4


def caption(scene: Scene, template: int = 0) -> str:
    """Say a scene in one of ``NUM_TEMPLATES`` ways; every way names every attribute."""
    if scene.position is not None:
        words = {"a": scene.things[0], "where": _WHERE[scene.position], "bg": scene.background}
        return _ONE[template % NUM_TEMPLATES].format(**words)
    assert scene.relation is not None, "a scene of two objects needs a relation"
    a, b = scene.things
    forward, reverse = _FORWARD[scene.relation], _REVERSE[scene.relation]
    return _TWO[template % NUM_TEMPLATES].format(a=a, b=b, forward=forward, reverse=reverse, bg=scene.background)


_THING = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b")
_POSITION = re.compile(rf"\b(?:on|in|at) the ({'|'.join(POSITIONS)})\b")
_RELATION = re.compile(r"\b(left of|right of|above|below)\b")


def parse(text: str) -> Scene:
    """Read a caption back.  Words around it are ignored, so a style suffix does no harm.

    Raises:
        ValueError: the text is not a caption of this world.
    """
    low = " ".join(text.lower().split())
    things = tuple(Thing(*match) for match in _THING.findall(low))
    backgrounds, positions, relations = (p.findall(low) for p in (_BACKGROUND, _POSITION, _RELATION))
    if len(backgrounds) == 1 and len(things) == 1 and len(positions) == 1 and not relations:
        return Scene(things, backgrounds[0], position=positions[0])
    if len(backgrounds) == 1 and len(things) == 2 and len(relations) == 1 and not positions:
        if relations[0] in RELATIONS:
            return Scene(things, backgrounds[0], relation=relations[0])
        return Scene(things[::-1], backgrounds[0], relation={"right of": "left of", "below": "above"}[relations[0]])
    raise ValueError(f"not a caption of the shapes world: {text!r}")


# ------------------------------------------------------------------ drawing scenes from a seed
def rng_for(split: str, seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one sample; `stream` 0 draws the scene, 1 its exact geometry."""
    return np.random.default_rng([SPLITS.index(split), seed, index, stream])


def has_held_out_pair(scene: Scene) -> bool:
    """True when an object is one of the (shape, colour) pairs kept from training."""
    return any((thing.shape, thing.colour) in HELD_OUT_PAIRS for thing in scene.things)


def is_reserved(scene: Scene) -> bool:
    """True for one scene in eight, picked by a digest: its caption is kept from training whatever its pairs."""
    return hashlib.blake2b(repr(scene).encode(), digest_size=4).digest()[0] % 8 == 0


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def any_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn from all scenes.  Two objects always differ in colour, so that each can be told by it."""
    background = pick(rng, BACKGROUNDS)
    first = Thing(pick(rng, SIZES), pick(rng, COLOURS), pick(rng, SHAPES))
    if rng.random() >= TWO_OBJECT_SHARE:
        return Scene((first,), background, position=pick(rng, POSITIONS))
    others = tuple(colour for colour in COLOURS if colour != first.colour)
    second = Thing(pick(rng, SIZES), pick(rng, others), pick(rng, SHAPES))
    return Scene((first, second), background, relation=pick(rng, RELATIONS))


def _belongs(split: str, rng: np.random.Generator) -> Callable[[Scene], bool]:
    if split == "train":
        return lambda scene: not has_held_out_pair(scene) and not is_reserved(scene)
    if split == "heldout" and rng.random() < HELD_OUT_SHARE:
        return has_held_out_pair
    return lambda scene: not has_held_out_pair(scene) and is_reserved(scene)


def sample(split: str, seed: int, index: int) -> tuple[Scene, str]:
    """The scene and caption number `index` of a split.

    `train` shows no held-out pair and no reserved scene; `eval` draws reserved scenes of trained pairs;
    `heldout` mixes both kinds of novelty and is the set that results are reported on.
    """
    rng = rng_for(split, seed, index)
    belongs = _belongs(split, rng)
    scene = next(s for s in iter(lambda: any_scene(rng), None) if belongs(s))
    return scene, caption(scene, int(rng.integers(NUM_TEMPLATES)))


def samples(split: str, seed: int, count: int, start: int = 0) -> Iterator[tuple[Scene, str]]:
    """Scenes and captions `start` .. `start + count - 1` of a split."""
    return (sample(split, seed, index) for index in range(start, start + count))


def unique_captions(split: str, seed: int, count: int) -> list[str]:
    """The first `count` different captions of a split, in order."""
    found: dict[str, None] = {}
    for index in range(50 * count + 1000):
        if len(found) == count:
            return list(found)
        found.setdefault(sample(split, seed, index)[1])
    raise ValueError(f"the split {split!r} has fewer than {count} different captions")


# ------------------------------------------------------------------ command line
def write_prompts(split: str, count: int, seed: int, out: Path) -> None:
    """One different caption a line."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(unique_captions(split, seed, count)) + "\n", encoding="utf-8")


def write_pictures(split: str, count: int, seed: int, out: Path) -> None:
    """PNGs and ``metadata.csv`` with the columns image (a path beside the table) and prompt; where it is, all is."""
    from PIL import Image

    from shapes.render import render

    out.mkdir(parents=True, exist_ok=True)
    partial = out / "metadata.partial"
    with open(partial, "w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["image", "prompt"])
        for index, (scene, text) in enumerate(samples(split, seed, count)):
            pixels = render(scene, rng_for(split, seed, index, stream=1))
            name = f"{index:06d}.png"
            Image.fromarray((pixels * 255 + 0.5).astype(np.uint8)).save(out / name)
            table.writerow([name, text])
    partial.replace(out / "metadata.csv")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m shapes.scenes", description="Captioned scenes of the embedded world."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, what in (("prompts", "write captions, one a line"), ("render", "write PNGs and metadata.csv")):
        sub = verbs.add_parser(verb, help=what, description=what)
        sub.add_argument("--split", choices=SPLITS, required=True)
        sub.add_argument("--count", type=int, required=True)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    (write_prompts if args.verb == "prompts" else write_pictures)(args.split, args.count, args.seed, args.out)


if __name__ == "__main__":
    main()
