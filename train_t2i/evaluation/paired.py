"""Paired comparisons: the same prompts, and where it can be the same noise.

``TABLE.paired.json`` beside the table holds each model's scores a prompt and every pair's differences, so that models
evaluated on different days are paired too.  A score is compared only where its scorer is the same in both rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train_t2i import metrics
from train_t2i.errors import UserError
from train_t2i.evaluation.table import write_text

DIGITS = 7  # significant ones of a stored score


@dataclass(frozen=True)
class Scored:
    """A model's scores of each prompt; of several images of a prompt their mean."""

    model: str
    prompts: str  # digest of all that was asked: prompts, what they edit, images a prompt
    noise: str | None  # digest of the seeds; None where nobody wrote them down
    scorers: dict[str, str]  # score -> what it was computed with
    values: dict[str, list[float]]  # score -> one a prompt


def digest(parts: Sequence[str | int | bytes]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update((part if isinstance(part, bytes) else str(part).encode()) + b"\0")
    return found.hexdigest()


def by_prompt(values: Tensor, prompts: int) -> Tensor:
    """(S x P,) scores, the first image of every prompt first -> (P,) fp64 means."""
    return values.double().view(-1, prompts).mean(0)


def paired_file(table: str) -> Path:
    path = Path(table)
    return path.with_name(f"{path.stem}.paired.json")


def read_scored(table: str) -> list[Scored]:
    """What earlier evaluations kept beside a table.  Raises UserError."""
    path = paired_file(table)
    try:
        return [Scored(**each) for each in json.loads(path.read_text(encoding="utf-8"))["scored"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", "remove it, and evaluate the models anew to pair them"
        ) from None


def merge_scored(table: str, scored: Scored, models: Sequence[str]) -> list[dict[str, Any]]:
    """Keep a model's scores in its place; every pair of the table's ``models`` that can be compared."""
    kept = {each.model: each for each in read_scored(table)} | {scored.model: scored}
    ordered = [kept[model] for model in models if model in kept]
    found = pairs(ordered)
    shorter = [
        asdict(each) | {"values": {k: [float(f"{x:.{DIGITS}g}") for x in v] for k, v in each.values.items()}}
        for each in ordered
    ]
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in shorter)
    told = json.dumps(found, ensure_ascii=False, indent=1)
    write_text(str(paired_file(table)), f'{{"scored": [\n{lines}\n],\n"pairs": {told}}}\n')
    return found


def pairs(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Every pair that was asked the same prompts, earlier model first; differences are A minus B."""
    return [
        {"a": a.model, "b": b.model, "same_noise": same_noise(a, b), "count": len(next(iter(a.values.values()))),
         "differences": found}
        for a, b in itertools.combinations(scored, 2)
        if a.prompts == b.prompts and (found := differences(a, b))
    ]  # fmt: skip


def same_noise(a: Scored, b: Scored) -> bool | None:
    return None if a.noise is None or b.noise is None else a.noise == b.noise


def differences(a: Scored, b: Scored) -> dict[str, dict[str, Any]]:
    """Score -> mean of A - B over prompts and its 95 % bootstrap interval."""
    found = {}
    for name in a.values:
        if name in b.values and a.scorers.get(name) == b.scorers.get(name):
            apart = torch.tensor(a.values[name], dtype=torch.float64) - torch.tensor(
                b.values[name], dtype=torch.float64
            )
            found[name] = {"mean": float(apart.mean()), "ci": list(metrics.bootstrap_ci(apart))}
    return found


def format_pairs(found: Sequence[Mapping[str, Any]]) -> str:
    """Plain text, a line a pair and score."""
    lines = []
    for pair in found:
        noise = {True: "same noise", False: "other noise", None: "noise unknown"}[pair["same_noise"]]
        for name, apart in pair["differences"].items():
            low, high = apart["ci"]
            lines.append(
                f"{pair['a']} - {pair['b']}, {name}: {apart['mean']:+.4g} (95 %: {low:+.4g} to {high:+.4g}; {pair['count']} prompts, {noise})"
            )
    return "\n".join(lines)
