"""What ``evaluate`` scores images with: an adherence function, reward models, a held-out tower.

Shapes: images (B, 3, H, W) in [0, 1]; scores (B,) fp32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rewards
from rewards.user import load_function
from train_t2i import storage
from train_t2i.errors import UserError
from train_t2i.evaluation.features import Features
from train_t2i.families.base import Source
from train_t2i.reward_flags import COLUMN_OF, reward_paths
from train_t2i.student import default_device

if TYPE_CHECKING:
    from train_t2i.evaluate import EvaluateConfig

Score = Callable[..., Tensor]  # (images, prompts), for edits with the sources -> (B,)


def load_scorer(spec: str) -> Score:
    """``module:function`` -> the function.  Raises UserError."""
    try:
        return load_function(spec)
    except rewards.RewardError as error:
        raise UserError(f"--scorer {spec}: {error.reason}", error.hint) from None


def wanted_rewards(config: EvaluateConfig) -> dict[str, tuple[str, str]]:
    """Column -> (reward, path of its weights), from ``--rewards`` and the flags of two of them.  Raises UserError."""
    given = [("clip", config.clip_reward_model), ("hpsv2", config.hpsv2_reward_model)]
    for kind, path in reward_paths("--rewards", config.rewards).items():
        if kind not in rewards.REWARDS:
            raise UserError(f"--rewards {kind}={path}: no such reward", f"one of {', '.join(rewards.REWARDS)}")
        given.append((kind, path))
    wanted: dict[str, tuple[str, str]] = {}
    for kind, weights in given:
        if weights is None:
            continue
        column = COLUMN_OF.get(kind, kind)
        if column in wanted:
            raise UserError(f"--rewards {kind}={weights}: the reward {kind} is given twice", "leave one out")
        wanted[column] = kind, weights
    return wanted


def load_reward(kind: str, path: str, device: torch.device) -> Any:
    try:
        return rewards.REWARDS[kind](path, device=device)
    except rewards.RewardError as error:
        raise UserError(str(error)) from None


class Scorers:
    """Everything that a row of the table is computed with; built, and so checked, before any model is loaded."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.device = default_device()
        self.adherence = load_scorer(config.scorer) if config.scorer else None
        wanted = wanted_rewards(config)
        self.rewards = {name: load_reward(kind, path, self.device) for name, (kind, path) in wanted.items()}
        self.held_out = load_reward("clip", config.held_out_model, self.device) if config.held_out_model else None
        weighed = wanted | ({"held_out": ("clip", config.held_out_model)} if config.held_out_model else {})
        digests = {name: weights_digest(kind, path) for name, (kind, path) in weighed.items()}
        self.features = Features(config, self.held_out, digests.get("held_out", ""), self.device)
        self.told: dict[str, Any] = {
            "scorer": config.scorer,
            "clip": None,
            "hps": None,
            **{name: path for name, (_, path) in wanted.items()},
            "magic_prompt": config.magic_prompt,
            "held_out": config.held_out_model,
            "reference": config.reference,
            "reference_count": len(self.features.rows),
            "inception": config.inception,
            "weights_xxh3": digests | self.features.inception_digest,
        }

    def _towers(self) -> dict[str, Any]:
        return self.rewards | ({"held_out": self.held_out} if self.held_out is not None else {})

    def identity(self, score: str) -> str:
        """What a score is computed with; scores of two models are compared where it is the same."""
        if score == "adherence":
            return str(self.config.scorer)
        weights = self.told["weights_xxh3"]["held_out" if score == "diversity" else score]
        return f"{weights} {self.config.magic_prompt}".strip() if score == "hps" else weights

    @torch.no_grad()
    def scores(
        self, images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Source]] = ()
    ) -> dict[str, Tensor]:
        """Column name -> (B,) fp32, in the order of the table."""
        found: dict[str, Tensor] = {}
        if self.adherence is not None:
            found["adherence"] = self._adherence(images.cpu(), prompts, sources)
        prefix = self.config.magic_prompt
        for name, tower in self._towers().items():
            told = [f"{prefix} {prompt}" for prompt in prompts] if name == "hps" and prefix else prompts
            found[name] = tower(images, told).float().cpu()
        return found

    def _adherence(self, images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Source]]) -> Tensor:
        """An edit is judged beside what it starts from: each row's sources as (3, h, w) in [0, 1]."""
        assert self.adherence is not None
        told = ([[source.pixels.float() / 255 for source in row] for row in sources],) if sources else ()
        try:
            scores = torch.as_tensor(self.adherence(images, list(prompts), *told), dtype=torch.float32).cpu()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--scorer {self.config.scorer}: {error}", "give prompts that it knows") from None
        if scores.shape != (len(prompts),):
            raise UserError(
                f"--scorer {self.config.scorer}: returned {tuple(scores.shape)} for {len(prompts)} images",
                "it returns one score an image",
            )
        return scores


def weights_digest(kind: str, weights: str) -> str:
    """xxh3 of a reward's weights file: says in the table which weights a number comes from."""
    return storage.digest(Path(rewards.find(kind).inspect(weights).path))[1]
