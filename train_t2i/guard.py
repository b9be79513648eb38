"""Whether rewards are being gamed: a pure function of what was read off the same images again and again.

A reading scores what the student makes of fixed prompts and fixed noise, so that every image is compared with itself at
another step, and most of what differs from image to image cancels.  Rewards that are followed by gradient first take what
they do not see along, then cost it (Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760):
what is in no loss is therefore compared with its best reading, not with its first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

SURE = 2.0  # standard errors that a change is larger than, to count
Scores = tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """What was watched at a step: N images of P prompts, always the same prompts and noise in the same order."""

    step: int
    training: dict[str, Scores]  # rewards in the loss -> the score of each image
    held_out: dict[str, Scores]  # rewards in no loss, likewise
    diversity: Scores  # P: how far apart the images of a prompt are
    recall: float | None = (
        None  # share of the reference that the images cover; shown, not judged: one number has no error
    )

    def means(self) -> dict[str, float | None]:
        """Column -> number, as logged."""
        named = {**self.training, **self.held_out, "diversity": self.diversity}
        return {name: fmean(scores) for name, scores in named.items()} | {"recall": self.recall}

    @property
    def finite(self) -> bool:
        every = (*self.training.values(), *self.held_out.values(), self.diversity)
        return all(math.isfinite(score) for scores in every for score in scores)


@dataclass(frozen=True)
class Tolerance:
    """How far something may fall below its best reading."""

    reward_drop: float  # a held-out reward: in standard deviations of its scores when rewards began
    diversity_drop: float  # diversity: as a share of its best


@dataclass(frozen=True)
class Move:
    """A number that went from one mean to another."""

    name: str
    since: int  # step
    before: float
    now: float

    def __str__(self) -> str:
        return f"{self.name} {self.before:.4g} -> {self.now:.4g} (since step {self.since})"


@dataclass(frozen=True)
class Verdict:
    """Training rewards that rose since rewards began, and what has fallen beyond the tolerance."""

    risen: tuple[Move, ...] = ()
    fallen: tuple[Move, ...] = ()

    @property
    def gamed(self) -> bool:
        return bool(self.risen and self.fallen)


def rise(before: Scores, now: Scores) -> float:
    """What the mean rose by at least: the mean change of an image, less ``SURE`` of its standard errors."""
    changes = [b - a for a, b in zip(before, now, strict=True)]
    return fmean(changes) - SURE * stdev(changes) / math.sqrt(len(changes))


def verdict(history: Sequence[Reading], tolerance: Tolerance) -> Verdict:
    """Judge the last of the readings since rewards began; ``history[0]`` is the one that they began at.

    A training reward has risen if its mean is above that when rewards began.  A held-out reward has fallen if it surely
    (``rise``, backwards) fell from its best reading by more than ``reward_drop`` standard deviations that the scores of
    single images had when rewards began; diversity, by more than ``diversity_drop`` of its best.  Both together are a game.
    """
    if len(history) < 2:
        return Verdict()
    first, last = history[0], history[-1]
    risen = [
        _move(name, first.step, scores, last.training[name])
        for name, scores in first.training.items()
        if fmean(last.training[name]) > fmean(scores)
    ]
    watched = {name: [(r.step, r.held_out[name]) for r in history] for name in last.held_out}
    limits = {name: tolerance.reward_drop * stdev(first.held_out[name]) for name in watched}
    watched["diversity"] = [(reading.step, reading.diversity) for reading in history]
    fallen = []
    for name, readings in watched.items():
        step, best = max(readings, key=lambda read: fmean(read[1]))
        limit = limits.get(name, tolerance.diversity_drop * fmean(best))
        if rise(readings[-1][1], best) > limit:
            fallen.append(_move(name, step, best, readings[-1][1]))
    return Verdict(tuple(risen), tuple(fallen))


def crossed(history: Sequence[Reading], tolerance: Tolerance) -> Verdict:
    """The verdict, of what fell only that which the reading before had not told: nothing where no limit was crossed."""
    now, before = verdict(history, tolerance), verdict(history[:-1], tolerance)
    told = {move.name for move in before.fallen} if before.gamed else set()
    fresh = tuple(move for move in now.fallen if move.name not in told)
    return Verdict(now.risen, fresh) if now.gamed and fresh else Verdict()


def worsens(history: Sequence[Reading], tolerance: Tolerance) -> bool:
    """Whether rewards are gamed and something that has fallen is lower than at the reading before."""
    now = verdict(history, tolerance)
    if not now.gamed:
        return False
    before = history[-2].means()
    return any(move.now < (before[move.name] or 0.0) for move in now.fallen)


def last_good(history: Sequence[Reading], tolerance: Tolerance) -> int | None:
    """The step of the last reading at which nothing had fallen, whatever rose; none where there is no reading."""
    good = [reading.step for i, reading in enumerate(history, 1) if not verdict(history[:i], tolerance).fallen]
    return good[-1] if good else None


def _move(name: str, step: int, before: Scores, now: Scores) -> Move:
    return Move(name, step, fmean(before), fmean(now))
