"""``python -m train_t2i votes FILE...``: win rates from blind votes, as the page of ``evaluate --side-by-side`` saves them.

A tie is half a win for each.  The interval is Wilson's, and a prompt is one trial however many people voted on it: their
votes are averaged.  Votes cast after the names were on the screen are left out, and counted aloud.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DONE, UserError

FORMAT = "train_t2i votes"
CHOICES = {"left": 1.0, "tie": 0.5, "right": 0.0}  # what the model on the left gets


@dataclass(frozen=True)
class VotesConfig:
    """Count blind votes between models: win rates with 95 % intervals."""

    files: tuple[str, ...] = flag(
        (), "votes file that the page of evaluate --side-by-side saved (may stand without the flag)"
    )
    out: str | None = flag(None, "JSON file to write the win rates to")


@dataclass(frozen=True)
class Vote:
    """On one prompt; ``left_is_first``: as the models were given to ``evaluate``."""

    sheet: str
    left_is_first: bool
    row: int
    left: str
    right: str
    choice: str
    blind: bool

    @property
    def pair(self) -> tuple[str, str]:
        return (self.left, self.right) if self.left_is_first else (self.right, self.left)


@dataclass(frozen=True)
class WinRate:
    a: str
    b: str
    votes: int
    prompts: int
    win_rate: float  # of a
    ci: tuple[float, float]
    wins: int
    ties: int
    losses: int
    left_rate: float  # how often the left image won: far from 0.5, the voter follows the side


def read_votes(file: str) -> list[Vote]:
    """Raises UserError for a file that no page of ours saved, or that votes on something twice."""
    path, votes = Path(file), []
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})", "give a file that the page saved") from None
    if not isinstance(kept, dict) or kept.get("format") != FORMAT or not isinstance(kept.get("votes"), list):
        raise UserError(f"{file}: not a votes file", "give a file that the page saved")
    for number, each in enumerate(kept["votes"], 1):
        try:
            left_is_first = kept["models"].index(each["left"]) < kept["models"].index(each["right"])
            told = (each[key] for key in ("row", "left", "right", "choice", "blind"))
            vote = Vote(str(kept["sheet"]), left_is_first, *told)
            sound = isinstance(vote.row, int) and isinstance(vote.blind, bool) and vote.choice in CHOICES
        except (KeyError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise UserError(f"{file}: vote {number} is damaged", "save the votes again")
        votes.append(vote)
    if len({(vote.row, vote.pair) for vote in votes}) < len(votes):
        raise UserError(f"{file}: two votes on one prompt and pair", "save the votes again")
    return votes


def win_rates(votes: Iterable[Vote]) -> list[WinRate]:
    """One a pair of models, in the order in which they come; blind votes alone."""
    groups: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        if vote.blind:
            groups.setdefault(vote.pair, []).append(vote)
    return [win_rate(*pair, group) for pair, group in groups.items()]


def win_rate(a: str, b: str, votes: Sequence[Vote]) -> WinRate:
    from train_t2i.metrics import wilson_interval

    left = [CHOICES[vote.choice] for vote in votes]
    scores = [score if vote.left == a else 1 - score for vote, score in zip(votes, left, strict=True)]
    prompts: dict[tuple[str, int], list[float]] = {}
    for vote, score in zip(votes, scores, strict=True):
        prompts.setdefault((vote.sheet, vote.row), []).append(score)
    share = sum(sum(each) / len(each) for each in prompts.values()) / len(prompts)
    wins, ties, losses = (scores.count(value) for value in (1.0, 0.5, 0.0))
    ci, left_rate = wilson_interval(share, len(prompts)), sum(left) / len(left)
    return WinRate(a, b, len(votes), len(prompts), share, ci, wins, ties, losses, left_rate)


def sentence(rate: WinRate) -> str:
    low, high = rate.ci
    return (
        f"{rate.a} against {rate.b}: wins {rate.win_rate:.1%} (95 %: {low:.1%} to {high:.1%}) on {rate.prompts} prompts; "
        f"{rate.wins} wins, {rate.ties} ties, {rate.losses} losses; the left image was preferred {rate.left_rate:.0%} of the time"
    )


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(VotesConfig, "votes", arguments)
    if not config.files:
        raise UserError("no votes to count", "give files that the page saved")
    votes = [vote for file in config.files for vote in read_votes(file)]
    rates = win_rates(votes)
    if not rates:
        raise UserError(f"{', '.join(config.files)}: no blind vote", "vote before the names are shown")
    for rate in rates:
        print(sentence(rate))
    if seen := sum(not vote.blind for vote in votes):
        print(f"{seen} votes were cast after the names had been shown: left out")
    if config.out:
        write_rates(config.out, rates)
    return EXIT_DONE


def write_rates(out: str, rates: Sequence[WinRate]) -> None:
    from dataclasses import asdict

    from train_t2i.storage import write_atomically

    told: list[dict[str, Any]] = [asdict(rate) for rate in rates]
    try:
        write_atomically(Path(out), json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})", "choose another file") from None
