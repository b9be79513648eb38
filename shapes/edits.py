"""Edits of the embedded world: what is asked for, and what the scene is afterwards.

An instruction changes one thing about the scene of one picture, or joins the objects of two.  With the scenes of its sources it
says everything: ``follow(edit.instruction, edit.sources) == edit.target``, so an edited picture can be judged without opinion
(see ``edit_oracle.py``; ``edit_pictures.py`` draws edits).  Everything is a function of (split, seed, index).

    python -m shapes.edits render --split train --count 2000 --seed 0 --out DIR [--kinds recolour move] [--free-colours]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_SHARE,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    any_scene,
    has_held_out_pair,
    is_reserved,
    pick,
    rng_for,
)

TEMPLATES = {
    "recolour": ("make the {a} {colour}", "change the colour of the {a} to {colour}", "paint the {a} {colour}"),
    "resize": ("make the {a} {size}", "change the size of the {a} to {size}", "let the {a} be {size}"),
    "reshape": ("change the {a} to a {shape}", "turn the {a} into a {shape}", "replace the {a} with a {shape}"),
    "background": (
        "make the background {background}", "change the background to {background}", "paint the background {background}",
    ),
    "move": ("move the {a} to the {position}", "shift the {a} to the {position}", "bring the {a} to the {position}"),
    "swap": ("swap the {a} and the {b}", "let the {a} and the {b} change places", "exchange the {a} and the {b}"),
    "compose": (
        "put the {a} of picture {i} {relation} the {b} of picture {j} on the background of picture 1",
        "on the background of picture 1, show the {a} of picture {i} {relation} the {b} of picture {j}",
        "the background of picture 1 with the {a} of picture {i} {relation} the {b} of picture {j}",
    ),
}  # fmt: skip
KINDS = tuple(TEMPLATES)
RELATION_WORDS = {  # how it is said -> (relation, whether the object that is named first comes second)
    "to the left of": ("left of", False),
    "to the right of": ("left of", True),
    "above": ("above", False),
    "below": ("above", True),
}
ANY = "object"  # what an only object may be called
_NAMED = rf"(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)})|{ANY}"
FIELDS = {
    "a": _NAMED, "b": _NAMED, "i": "1|2", "j": "1|2", "colour": "|".join(COLOURS), "size": "|".join(SIZES),
    "shape": "|".join(SHAPES), "background": "|".join(BACKGROUNDS), "position": "|".join(POSITIONS),
    "relation": "|".join(RELATION_WORDS),
}  # fmt: skip
_PATTERNS = [
    (kind, re.compile(re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", template)))
    for kind, templates in TEMPLATES.items()
    for template in templates
]


@dataclass(frozen=True)
class Edit:
    """The scenes of one or two source pictures, what is asked for, and the scene that is wanted."""

    kind: str
    sources: tuple[Scene, ...]
    instruction: str
    target: Scene


# ------------------------------------------------------------------ what an instruction means
def parse(instruction: str) -> tuple[str, dict[str, str]]:
    """The kind of an instruction and the words that fill its template.

    Raises:
        ValueError: the text is not an instruction of this world.
    """
    low = " ".join(instruction.lower().split()).rstrip(".")
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(low):
            return kind, match.groupdict()
    raise ValueError(f"not an edit instruction of the shapes world: {instruction!r}")


def _fits(name: str, thing: Thing) -> bool:
    *colour, shape = name.split()
    return shape in (ANY, thing.shape) and colour in ([], [thing.colour])


def _place_of(name: str, scene: Scene) -> int:
    """Which object of a scene a name means."""
    fitting = [place for place, thing in enumerate(scene.things) if _fits(name, thing)]
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} objects of the source are 'the {name}', not one")
    return fitting[0]


def _composed(told: dict[str, str], sources: Sequence[Scene]) -> Scene:
    if told["i"] == told["j"]:
        raise ValueError("a composition joins the objects of two pictures")
    pictures = (sources[int(told["i"]) - 1], sources[int(told["j"]) - 1])
    a, b = (picture.things[_place_of(told[name], picture)] for name, picture in zip("ab", pictures))
    relation, reverse = RELATION_WORDS[told["relation"]]
    return Scene((b, a) if reverse else (a, b), sources[0].background, relation=relation)


def follow(instruction: str, sources: Sequence[Scene]) -> Scene:
    """The scene that an instruction makes of those of its source pictures.

    Raises:
        ValueError: the text is not an instruction of this world, or these are no sources for it.
    """
    kind, told = parse(instruction)
    needed = 2 if kind == "compose" else 1
    if len(sources) != needed:
        raise ValueError(f"{len(sources)} source pictures, where {instruction!r} needs {needed}")
    if kind == "compose":
        return _composed(told, sources)
    scene = sources[0]
    if kind == "background":
        return replace(scene, background=told["background"])
    place = _place_of(told["a"], scene)
    if kind == "move":
        if len(scene.things) != 1:
            raise ValueError("an object moves when it is alone")
        return replace(scene, position=told["position"])
    if kind == "swap":
        if {place, _place_of(told["b"], scene)} != {0, 1}:
            raise ValueError("two different objects change places")
        return replace(scene, things=scene.things[::-1])
    changed = {"recolour": "colour", "resize": "size", "reshape": "shape"}[kind]
    thing = replace(scene.things[place], **{changed: told[changed]})
    return replace(scene, things=(*scene.things[:place], thing, *scene.things[place + 1 :]))


# ------------------------------------------------------------------ drawing edits from a seed
def _name(scene: Scene, place: int, rng: np.random.Generator) -> str:
    """One of the names that mean this object of the scene and no other."""
    thing = scene.things[place]
    names = (thing.shape, f"{thing.colour} {thing.shape}", ANY)
    return pick(rng, tuple(name for name in names if sum(_fits(name, other) for other in scene.things) == 1))


def _other(rng: np.random.Generator, options: tuple[str, ...], *taken: str | None) -> str:
    return pick(rng, tuple(option for option in options if option not in taken))


def _words(kind: str, sources: Sequence[Scene], rng: np.random.Generator) -> dict[str, str]:
    """What to ask for: words for the template, always for a change."""
    scene = sources[0]
    if kind == "compose":
        i = int(rng.integers(2))
        a, b = (_name(sources[number], 0, rng) for number in (i, 1 - i))
        relation = pick(rng, tuple(RELATION_WORDS))
        return {"a": a, "b": b, "i": str(i + 1), "j": str(2 - i), "relation": relation}
    place = int(rng.integers(len(scene.things)))
    thing, words = scene.things[place], {"a": _name(scene, place, rng)}
    if kind == "swap":
        return {**words, "b": _name(scene, 1 - place, rng)}
    new = {
        "recolour": lambda: {"colour": _other(rng, COLOURS, *(each.colour for each in scene.things))},
        "resize": lambda: {"size": _other(rng, SIZES, thing.size)},
        "reshape": lambda: {"shape": _other(rng, SHAPES, thing.shape)},
        "background": lambda: {"background": _other(rng, BACKGROUNDS, scene.background)},
        "move": lambda: {"position": _other(rng, POSITIONS, scene.position)},
    }
    return {**words, **new[kind]()}


def _sources(kind: str, rng: np.random.Generator) -> tuple[Scene, ...]:
    """Scenes that this kind of edit can start from."""
    wanted = {"move": 1, "swap": 2, "compose": 1}.get(kind)
    while True:
        scenes = tuple(any_scene(rng) for _ in range(2 if kind == "compose" else 1))
        colours = [thing.colour for scene in scenes for thing in scene.things]
        if len(set(colours)) == len(colours) and all(wanted in (None, len(scene.things)) for scene in scenes):
            return scenes


def _any_edit(kind: str, rng: np.random.Generator) -> Edit:
    """An edit of this kind, drawn from all of them."""
    sources = _sources(kind, rng)
    instruction = pick(rng, TEMPLATES[kind]).format(**_words(kind, sources, rng))
    return Edit(kind, sources, instruction, follow(instruction, sources))


def _belongs(split: str, rng: np.random.Generator) -> Callable[[Edit], bool]:
    def trained(scene: Scene) -> bool:
        return not has_held_out_pair(scene) and not is_reserved(scene)

    if split == "train":
        return lambda edit: all(map(trained, (*edit.sources, edit.target)))
    if split == "heldout" and rng.random() < HELD_OUT_SHARE:
        return lambda edit: has_held_out_pair(edit.target)
    return lambda edit: is_reserved(edit.target) and not any(map(has_held_out_pair, (*edit.sources, edit.target)))


def sample(split: str, seed: int, index: int, kinds: tuple[str, ...] = KINDS) -> Edit:
    """The edit number `index` of a split, of one of `kinds`.

    `train` shows no held-out pair and no reserved scene, in sources or target; `eval` makes reserved scenes of trained pairs;
    `heldout` makes those and scenes with a held-out pair (see scenes.py), and is the set that results are reported on.
    """
    rng = rng_for(split, seed, index, stream=2)
    kind, belongs = pick(rng, kinds), _belongs(split, rng)
    return next(edit for edit in iter(lambda: _any_edit(kind, rng), None) if belongs(edit))


def samples(split: str, seed: int, count: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Edit]:
    """Edits 0 .. count - 1 of a split."""
    return (sample(split, seed, index, kinds) for index in range(count))


# ------------------------------------------------------------------ command line
def main(argv: list[str] | None = None) -> None:
    from shapes.edit_pictures import draw, write_edits
    from shapes.free_colours import draw_free

    parser = argparse.ArgumentParser(prog="python -m shapes.edits", description="Edits of the embedded world.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    what = "write source and target PNGs and metadata.json"
    sub = verbs.add_parser("render", help=what, description=what)
    sub.add_argument("--split", choices=SPLITS, required=True)
    sub.add_argument("--count", type=int, required=True)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    sub.add_argument(
        "--free-colours",
        action="store_true",
        help="every other edit of objects of any colour, where it can be told without their names",
    )
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    write_edits(
        args.split, args.count, args.seed, args.out, tuple(args.kinds), draw_free if args.free_colours else draw
    )


if __name__ == "__main__":
    main()
