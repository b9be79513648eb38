"""Forward processes ("paths"), the student's grids of few times, and the distributions that times are drawn from.

Shapes: B rows; C H W latent; t and s are (B,) fp32 in [0, 1], 1 = pure noise, 0 = clean.  Everything is fp32 and pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """A forward process x_t = alpha(t) x0 + sigma(t) noise, and how a network's output on it is read."""

    @property
    def shift(self) -> float: ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def to_x0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def grid(self, num_steps: int) -> Tensor: ...

    def dense_grid(self, num_steps: int) -> Tensor: ...


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) so that it multiplies ``like`` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def shift_time(u: Tensor, shift: float) -> Tensor:
    """t = s u / (1 + (s - 1) u): moves times towards the noise for s > 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class EpsilonVP:
    """Variance-preserving diffusion with 1000 discrete levels and a noise-predicting network (SDXL).

    A time t means level ``clamp(round(1000 t), 0, 999)``; t = 0 is clean data in ``step``.
    """

    alphas_cumprod: Tensor  # (1000,) fp32
    shift: float = 1.0
    one_step_level: int = 399  # DMD2: conditioning a one-step SDXL at 999 leaves noise artefacts

    def levels(self, t: Tensor) -> Tensor:
        """(B,) fp32 in [0, 1] -> (B,) int64 in 0..999: the network's own unit of time."""
        count = len(self.alphas_cumprod)
        return (t.float() * count).round().long().clamp(0, count - 1)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, 1, 1, 1) fp32 factors: alpha = sqrt(abar), sigma = sqrt(1 - abar)."""
        abar = self.alphas_cumprod.to(t.device, non_blocking=True)[self.levels(t)]
        return per_row(abar.sqrt(), like), per_row((1 - abar).sqrt(), like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        # DDPM (arXiv 2006.11239) eq. 4: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()

    def to_x0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        # DDPM eq. 4 solved for x0, with the predicted eps
        alpha, sigma = self.alpha_sigma(t, x_t)
        return (x_t.float() - sigma * out.float()) / alpha

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float()

    def step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor | None = None) -> Tensor:
        """t -> s <= t: DDIM (arXiv 2010.02502 eq. 12, eta = 0), or re-noised with ``noise``; rows with s = 0 get x0."""
        if noise is None:
            alpha, sigma = self.alpha_sigma(t, x_t)
            noise = (x_t.float() - alpha * x0.float()) / sigma
        stepped = self.add_noise(x0, noise, s)
        return torch.where(per_row(s > 0, x0), stepped, x0.float())

    def grid(self, num_steps: int) -> Tensor:
        """(num_steps + 1,) fp32 descending to 0.  One step: 0.399.  More: the levels 999, 749, 499, 249 (at four),
        which are exactly those of ``LCMScheduler(original_inference_steps=num_steps)`` in an exported pipeline."""
        count = len(self.alphas_cumprod)
        if num_steps == 1:
            return torch.tensor([self.one_step_level / count, 0.0])
        if not 1 <= num_steps <= count:
            raise ValueError(f"a grid has 1 to {count} steps, not {num_steps}")
        last_levels = torch.arange(num_steps, 0, -1) * (count // num_steps)
        shifted = (shift_time(last_levels / count, self.shift) * count).round() - 1
        return torch.cat([shifted / count, torch.zeros(1)])

    def dense_grid(self, num_steps: int) -> Tensor:
        """(num_steps + 1,) fp32: the teacher's many times, diffusers' ``timestep_spacing="trailing"``."""
        count = len(self.alphas_cumprod)
        levels = (torch.arange(num_steps, 0, -1) * (count / num_steps)).round() - 1
        return torch.cat([levels / count, torch.zeros(1)])


def even_times(num_steps: int) -> Tensor:
    """(num_steps + 1,) fp32: 1, 1 - 1/N, ..., 1/N, 0."""
    return torch.arange(num_steps, -1, -1, dtype=torch.float32) / num_steps


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines between data and noise, and a network that predicts their velocity (SD3, FLUX.1, Qwen-Image)."""

    shift: float = 1.0  # of the student's grid
    dense: Callable[[int], Tensor] = even_times  # the teacher's own times: its scheduler's

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        # Rectified flow (arXiv 2209.03003) eq. 1: x_t = (1 - t) x0 + t noise
        time = per_row(t.float(), x0)
        return (1 - time) * x0.float() + time * noise.float()

    def to_x0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        # the same line, followed from x_t down to t = 0 with the predicted velocity
        return x_t.float() - per_row(t.float(), x_t) * out.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float() - x0.float()

    def step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor | None = None) -> Tensor:
        """t -> s <= t: an Euler step of the ODE, or re-noised with ``noise``; rows with s = 0 get x0."""
        if noise is None:
            noise = x0.float() + (x_t.float() - x0.float()) / per_row(t.float(), x_t)
        return torch.where(per_row(s > 0, x0), self.add_noise(x0, noise, s), x0.float())

    def grid(self, num_steps: int) -> Tensor:
        """(num_steps + 1,) fp32 descending from 1 to 0, shifted."""
        if not 1 <= num_steps <= 1000:
            raise ValueError(f"a grid has 1 to 1000 steps, not {num_steps}")
        return shift_time(even_times(num_steps), self.shift)

    def dense_grid(self, num_steps: int) -> Tensor:
        return self.dense(num_steps)


def cosine_fall(step: int, num_steps: int) -> float:
    """From 1 at step 0 to 0 at ``num_steps`` and after; 0 throughout when ``num_steps`` is 0."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps)) if step < num_steps else 0.0


def power_decay(step: int, start: int, power: float) -> float:
    """What is left of a moving average at the update after ``step``: 0 up to ``start``, then ever nearer to 1.

    Power-function averaging (Karras, arXiv 2312.02696, eq. 127): with t = step + 1 - start, (1 - 1 / t)^(power + 1).
    """
    return (1 - 1 / max(step + 1 - start, 1)) ** (power + 1)


@dataclass(frozen=True)
class TimeSampler:
    """How times in [low, high] are drawn: ``uniform``, ``beta`` or ``logit_normal``.

    For ``beta`` the parameters run from (a, b) to (1, 1) over ``dynamic_steps`` generator steps (DMDR's dynamic renoise
    sampling) and stay fixed if that is 0; for ``logit_normal`` a is the mean and b the deviation.
    """

    kind: str = "uniform"
    a: float = 1.0
    b: float = 1.0
    dynamic_steps: int = 0
    low: float = field(default=0.02)
    high: float = field(default=0.98)

    def beta_at(self, step: int) -> tuple[float, float]:
        """DMDR: alpha = 1 + (alpha_0 - 1) c, beta = 1 + (beta_0 - 1) c, with the cosine c falling from 1 to 0."""
        fall = cosine_fall(step, self.dynamic_steps) if self.dynamic_steps else 1.0
        return 1 + (self.a - 1) * fall, 1 + (self.b - 1) * fall

    def sample(self, draw: _Draws, stream: str, step: int) -> Tensor:
        """(B,) fp32 times in [low, high]."""
        if self.kind == "beta":
            unit = draw.beta(stream, *self.beta_at(step))
        elif self.kind == "logit_normal":
            unit = draw.logit_normal(stream, self.a, self.b)
        else:
            unit = draw.uniform(stream)
        return self.low + (self.high - self.low) * unit

    def sample_index(self, draw: _Draws, stream: str, step: int, grid: Tensor) -> Tensor:
        """(B,) int64: which of the grid's times (the closing 0 left out); uniform, or nearest to a continuous draw."""
        times = grid[:-1]
        if self.kind == "uniform":
            return draw.integers(stream, len(times))
        continuous = self.sample(draw, stream, step)
        return (continuous[:, None] - times[None]).abs().argmin(dim=1)


class _Draws(Protocol):
    """The part of ``randomness.Draw`` that times are drawn with."""

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> Tensor: ...

    def beta(self, stream: str, a: float, b: float) -> Tensor: ...

    def logit_normal(self, stream: str, mean: float, std: float) -> Tensor: ...

    def integers(self, stream: str, count: int) -> Tensor: ...
