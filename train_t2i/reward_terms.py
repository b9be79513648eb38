"""Reward models of a run: looked at before anything loads, then built as terms of the loss."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

import rewards
from rewards.semantic import SemanticRelative
from train_t2i.config import DirectConfig, DMDRConfig, listed
from train_t2i.errors import UserError
from train_t2i.methods import RewardTerm
from train_t2i.reward_flags import WantedReward, wanted_rewards

FEATURES = "clip"  # the reward whose tower --feature-model is


def wanted_by(config: Any) -> tuple[WantedReward, ...]:
    """The rewards in a method's loss.  Raises UserError."""
    return wanted_rewards(config) if isinstance(config, DMDRConfig) else ()


def asked_for(config: Any) -> list[tuple[str, str, str | None]]:
    """(what it is for, the reward, its weights) of every reward model that a method builds.  Raises UserError."""
    asked = [(f"reward {one.column}", one.reward, one.path) for one in wanted_by(config)]
    if isinstance(config, DirectConfig) and config.feature_model:
        asked.append(("features", FEATURES, config.feature_model))
    return asked


def check(config: Any) -> list[str]:
    """Look at every reward's file, also of those that this run never reaches; lines that say what was found."""
    return [f"{role}: {look_at('--extra-rewards', name, path)}" for role, name, path in asked_for(config)]


def look_at(option: str, name: str, path: str | None) -> rewards.WeightsReport:
    """Whether a reward could be built; ``option`` is told where the name is at fault.  Raises UserError."""
    try:
        return rewards.find(name).inspect(path)
    except rewards.RewardError as error:
        by_name = name not in rewards.REWARDS  # not a file, which would speak for itself
        raise UserError(f"{option} {error}" if by_name else str(error)) from None


def build_reward(name: str, path: str | None, dtype: torch.dtype, device: torch.device, checkpointing: bool) -> Any:
    """A reward by its name, with its weights.  Raises UserError."""
    try:
        return rewards.find(name)(path, dtype=dtype, device=device, checkpointing=checkpointing)
    except rewards.RewardError as error:
        raise UserError(str(error)) from None


def build_features(
    config: Any, dtype: torch.dtype, device: torch.device, checkpointing: bool
) -> Callable[[Tensor], Tensor] | None:
    """What compares the student's images with the teacher's, where a run has it."""
    if not isinstance(config, DirectConfig) or not config.feature_model:
        return None
    return build_reward(FEATURES, config.feature_model, dtype, device, checkpointing).encode_images


def build_terms(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
    seed: int,
    only: Container[str] | None = None,
) -> tuple[RewardTerm, ...]:
    """The terms of a method's loss; of ``only`` these rewards, where it is given.  Raises UserError."""
    terms = []
    for one in wanted_by(config):
        if only is not None and one.reward not in only:
            continue
        score = build_reward(one.reward, one.path, dtype, device, checkpointing)
        if config.srpo and one.reward == "hpsv2":
            words = listed(config.srpo_positive), listed(config.srpo_negative)
            score = SemanticRelative(score, *words, k=config.srpo_k, seed=seed)
        terms.append(RewardTerm(one.column, score, one.weight, one.margin, one.prefix))
    return tuple(terms)
