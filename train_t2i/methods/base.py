"""What a method is: what it trains, what it needs simulated, and its losses.

Shapes: B rows; C H W latent; t (B,) fp32 in [0, 1]; images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from train_t2i.families.base import Cond, Family, Source
from train_t2i.networks import Networks, Role
from train_t2i.randomness import Draw
from train_t2i.sampling import few_step

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Clock:
    """Where a run stands: ticks and steps finished, ticks finished since the last step, and how much rewards still count.

    The step is counted, not derived from the tick: a second stage may change the update ratio.
    """

    tick: int = 0
    step: int = 0
    tick_in_step: int = 0
    reward_scale: float = 1.0  # what the guard has left of the rewards' weights


@dataclass(frozen=True)
class Batch:
    """Rows of this process.  ``indices`` count samples over the whole run: they key every random draw."""

    indices: Sequence[int]
    prompts: list[str]
    rows: Sequence[int] = ()  # of the data: the same row comes again in every epoch
    images: Tensor | None = None  # (B, 3, H, W)
    seeds: Sequence[int] = ()  # of the noise that the teacher's result was made from
    rand_devices: Sequence[str] = ()  # whose generator drew it
    num_steps: Sequence[int] = ()  # of the student, where rows have their own
    latents: Tensor | None = None  # (B, C, H, W) the teacher's result
    states: Tensor | None = None  # (B, N - 1, C, H, W) where it was at the student's times
    sources: Sequence[Sequence[Source]] = ()  # what each row's edit starts from


@dataclass(frozen=True)
class RewardTerm:
    """A reward in the loss: weight x mean relu(margin - score), or of -score without a margin, on prompts with ``prefix`` before."""

    name: str
    score: Callable[..., Tensor]  # (images, prompts, tick=) -> (B,)
    weight: float
    margin: float | None
    prefix: str = ""

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        return [f"{self.prefix} {prompt}" if self.prefix else prompt for prompt in prompts]


@dataclass(frozen=True)
class Setting:
    """Where a method works: its networks, its grid of times, the latent's shape and the run's seed."""

    networks: Networks
    family: Family
    grid: Tensor  # (N + 1,) fp32
    latent_shape: tuple[int, int, int]
    seed: int
    device: torch.device
    rewards: tuple[RewardTerm, ...] = ()
    features: Callable[[Tensor], Tensor] | None = None  # images (B, 3, H, W) -> (B, D) of length one
    sample_type: str = "sde"  # between the student's steps: re-noised, or along the velocity ("ode")
    calls_need_all: bool = False  # sharded networks: every process makes the same network calls, whatever its rows drew
    least_rows: int = 1  # of a call with fewer rows than the batch: compiled code of one row is other code

    def draw(self, clock: Clock, indices: Sequence[int]) -> Draw:
        return Draw(self.seed, clock.tick, indices, self.device)


class Method(Protocol):
    """One file a method.  ``rollout`` builds no graph; ``losses`` yields ``parts`` losses, one backward each."""

    uses: tuple[Role, ...]
    trains: tuple[Role, ...]
    data: Literal["prompts", "images", "pairs"]
    parts: int
    columns: dict[Role, tuple[str, ...]]  # the metrics that ``losses`` reports, a role

    @staticmethod
    def lora_targets(family: Family) -> tuple[str, ...]:
        """The layers that get a LoRA where a run names none."""
        return family.lora_targets

    @staticmethod
    def adapt(net: nn.Module, adapter: str, config: Any) -> None:
        """Give the generator's adapter layers of its own; nothing unless a method needs it."""

    def roles_at(self, clock: Clock) -> tuple[Role, ...]:
        """Who is updated at a tick, in this order."""
        return self.trains

    def ema_decay(self, step: int) -> float | None:
        """What is left of the generator's moving average at an update; None: the method has none."""
        return None

    def rollout(self, batch: Batch, clock: Clock) -> Any: ...

    def losses(self, role: Role, rollout: Any, clock: Clock) -> Iterator[tuple[Tensor, Metrics]]: ...

    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor: ...


def sample_student(setting: Setting, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
    """The generator's few steps on its training grid, without guidance; (B, C, H, W)."""
    networks = setting.networks

    def x0_at(x: Tensor, t: Tensor) -> Tensor:
        return networks.x0("generator", x, t, cond)

    path = setting.family.path
    return few_step(x0_at, path, setting.grid, noise, renoise if setting.sample_type == "sde" else None)


def drop_captions(cond: Cond, dropped: Tensor) -> Cond:
    """Rows where ``dropped`` (B,) bool is true get the negative conditioning; (B, ...) as before."""
    assert cond.negative is not None

    def choose(positive: Tensor | None, negative: Tensor | None) -> Tensor | None:
        if positive is None or negative is None:
            return positive
        return torch.where(dropped.reshape(-1, *[1] * (positive.ndim - 1)), negative, positive)

    both = cond.with_negative()  # of one text length
    negative, tokens = both.tokens.chunk(2)
    masks = (None, None) if both.mask is None else both.mask.chunk(2)
    return replace(
        cond,
        tokens=torch.where(dropped.reshape(-1, 1, 1), negative, tokens),
        pooled=choose(cond.pooled, cond.negative.pooled),
        mask=choose(masks[1], masks[0]),
        negative=None,
    )
