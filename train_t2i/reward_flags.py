"""What the flags of rewards ask for: which are in the loss, at what weight, and which are only watched."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from train_t2i.config import DMDRConfig, listed
from train_t2i.errors import UserError

COLUMN_OF = {"hpsv2": "hps"}  # reward -> its name in logs and tables, where that is another
EXTRA = re.compile(r"(?P<weight>[^*=]+)\*(?:(?P<name>[^:=]+)=(?P<path>.+)|(?P<function>[^=]+:[^=]+))")


@dataclass(frozen=True)
class WantedReward:
    """A reward of the loss: weight x mean relu(margin - score), or weight x mean -score where there is no margin."""

    reward: str  # a name of rewards.REWARDS, or module:function
    path: str | None  # of its weights; none of a function
    weight: float  # 0 watches
    margin: float | None
    prefix: str = ""  # words before its prompts

    @property
    def column(self) -> str:
        """Its name in logs."""
        return COLUMN_OF.get(self.reward, self.reward.rpartition(":")[2].replace(".", "_"))


def wanted_rewards(method: DMDRConfig) -> tuple[WantedReward, ...]:
    """Those that are in the loss, in the order of their columns.  Raises UserError."""
    prefix = "" if method.srpo else method.magic_prompt
    given = (
        WantedReward("clip", method.clip_reward_model, method.reward_clip_weight, method.reward_margin),
        WantedReward("hpsv2", method.hpsv2_reward_model, method.reward_hps_weight, method.reward_margin, prefix),
    )
    wanted = (*(one for one in given if one.path), *extra_rewards(method))
    twice = [column for column, count in Counter(one.column for one in wanted).items() if count > 1]
    if twice:
        raise UserError(f"--extra-rewards: {twice[0]} is given twice", "leave one out")
    return wanted


def extra_rewards(method: DMDRConfig) -> list[WantedReward]:
    """The entries of ``--extra-rewards``.  Raises UserError."""
    found = []
    for entry in listed(method.extra_rewards):
        parts = EXTRA.fullmatch(entry)
        weight = _number(parts["weight"]) if parts else None
        if not parts or weight is None or not 0 <= weight < float("inf"):
            raise UserError(
                f"--extra-rewards {entry}: not WEIGHT*NAME=PATH or WEIGHT*MODULE:FUNCTION",
                "e.g. 0.3*pickscore=FOLDER,0.1*my_rewards:brightness",
            )
        found.append(
            WantedReward(parts["function"] or parts["name"], parts["path"], weight, method.extra_reward_margin)
        )
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def reward_paths(option: str, given: str) -> dict[str, str]:
    """Reward name -> its weights, from a comma list of NAME=PATH.  Raises UserError."""
    paths: dict[str, str] = {}
    for entry in listed(given):
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or name in paths:
            told = "is given twice" if name in paths else "is not NAME=PATH"
            raise UserError(f"{option} {entry}: {told}", "e.g. clip=FOLDER,hpsv2=FILE")
        paths[name] = path
    return paths


def monitor_paths(method: DMDRConfig) -> dict[str, str]:
    """Reward name -> its weights, of the rewards that are watched and in no loss.  Raises UserError."""
    return reward_paths("--monitor-rewards", method.monitor_rewards)
