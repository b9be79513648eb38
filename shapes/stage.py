"""What a stage of the pretraining is, and what all of them see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes.world import World, load_world

SEED = 0
PICTURES = 8192


@dataclass(frozen=True)
class Paths:
    """`out`: the committed folder; `work`: what can be made again."""

    out: Path
    work: Path

    @property
    def sdxl(self) -> Path:
        return self.out / "tiny-sdxl"

    @property
    def taesd(self) -> Path:
        return self.out / "tiny-taesd"

    @property
    def clip_trainee(self) -> Path:
        """What the preference tower starts from."""
        return self.work / "clip-trainee.pt"

    @property
    def record(self) -> Path:
        return self.out / "tiny-recipes.json"

    def flow(self, family: str) -> Path:
        """The pipeline folder of a rectified-flow family."""
        return self.out / f"tiny-{family.replace('_', '-')}"


@dataclass(frozen=True)
class Stage:
    """One thing to train: what decides its outcome, what it builds on, where it ends up, how it is made.

    ``make(paths, run_name)``: a stage that the trainer trains works in ``paths.work / run_name``.
    """

    name: str
    recipe: Any
    needs: tuple[str, ...]
    output: Callable[[Paths], Path]
    make: Callable[[Paths, str], dict[str, float]]


def world(paths: Paths) -> World:
    """The training pictures, the same for all stages."""
    return load_world("train", SEED, PICTURES, paths.work)


def judged(paths: Paths, count: int = 500) -> World:
    """Pictures that no stage trains on."""
    return load_world("heldout", SEED + 1, count, paths.work)
