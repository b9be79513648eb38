"""Supervised training: the denoising loss on image-text pairs, with caption dropout for classifier-free guidance.

An edit model's dropped caption leaves its sources, as its pipeline's negative does.
Shapes: B rows; C H W latent; t (B,) fp32 in [0, 1].

Departures from VideoX-Fun's trainer of Qwen-Image-Edit and diffusers' of SD3:
1. Times and mixing are fp32; every row draws its own time, on every process.
2. ``--uniform-sampling`` spreads the rows of a tick over all levels, not each process over a band of its own.
3. Images and sources are encoded to the mean of the VAE's distribution (the pipelines do so with sources).
4. No element of the loss is left out for being large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train_t2i import losses
from train_t2i.config import SFTConfig
from train_t2i.families.base import Cond
from train_t2i.methods.base import Batch, Clock, Method, Metrics, Setting, drop_captions
from train_t2i.networks import Role
from train_t2i.randomness import Draw
from train_t2i.sampling import many_step

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2
LEAST_TIME = 1e-3  # where weights that grow towards t = 0 stop


@dataclass(frozen=True)
class Rollout:
    cond: Cond
    draw: Draw
    latents: Tensor  # (B, C, H, W)


class SFT(Method):
    uses: tuple[Role, ...] = ("generator",)
    trains: tuple[Role, ...] = ("generator",)
    data = "images"
    parts = 1

    def __init__(self, config: SFTConfig, setting: Setting, num_steps: int = 25, cfg: float = 7.0) -> None:
        self.config, self.setting, self.num_steps, self.cfg = config, setting, num_steps, cfg
        self._cached: dict[int, tuple[Cond, Tensor]] = {}
        self.columns: dict[Role, tuple[str, ...]] = {"generator": ("loss",)}

    def ema_decay(self, step: int) -> float | None:
        return self.config.ema_decay or None

    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        draw = self.setting.draw(clock, batch.indices)
        cond, latents = self._from_cache(batch) if self.config.cache_rows else self._encode(batch)
        dropped = draw.uniform("caption_dropout") < self.config.caption_dropout
        return Rollout(drop_captions(cond, dropped), draw, latents)

    def _encode(self, batch: Batch) -> tuple[Cond, Tensor]:
        assert batch.images is not None
        family, images = self.setting.family, batch.images.to(self.setting.device, non_blocking=True)
        parts = images.split(self.config.vae_mini_batch or len(images))
        latents = torch.cat([family.to_latents(part) for part in parts])
        return family.encode(batch.prompts, "", batch.sources), latents

    def _from_cache(self, batch: Batch) -> tuple[Cond, Tensor]:
        """Rows are encoded one by one: what is kept must not depend on the batch it came in, or a resumed run, which
        fills the cache in other batches, would differ in the last bits."""
        assert batch.images is not None
        for i, row in enumerate(batch.rows):
            if row not in self._cached:
                here = slice(i, i + 1)
                alone = replace(
                    batch, prompts=batch.prompts[here], images=batch.images[here], sources=batch.sources[here]
                )
                self._cached[row] = self._encode(alone)
        conds, latents = zip(*(self._cached[row] for row in batch.rows), strict=True)
        return Cond.cat(conds), torch.cat(latents)

    def losses(self, role: Role, rollout: Rollout, clock: Clock) -> Iterator[tuple[Tensor, Metrics]]:
        path, x0 = self.setting.family.path, rollout.latents
        rank = noise_rank(self.config, rollout.draw)
        t = self.setting.family.training_time(rank, (x0.shape[-2], x0.shape[-1]))
        noise = rollout.draw.normal("noise", x0.shape[1:])
        out = self.setting.networks.predict(role, path.add_noise(x0, noise, t), t, rollout.cond)
        loss = losses.denoising(out, path.target(x0, noise, t), time_weight(self.config.weighting_scheme, t))
        yield loss, {"loss": loss.detach()}

    @torch.no_grad()
    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        """Many guided steps: what is trained here is a teacher."""

        def x0_at(x: Tensor, t: Tensor) -> Tensor:
            return self.setting.networks.x0("generator", x, t, cond, cfg=self.cfg)

        return many_step(x0_at, self.setting.family.path, self.num_steps, noise)


def noise_rank(config: SFTConfig, draw: Draw) -> Tensor:
    """(B,) in [0, 1): the share of all noise levels that are lower than each row's.

    SD3 (arXiv 2403.03206, section 3.1) counts from the noise down: its u is 1 - rank.
    """
    if config.uniform_sampling:
        # Kronecker sequence of the golden ratio: any run of indices is spread evenly, so every process's share is too
        first = replace(draw, indices=[0] * len(draw.indices)).uniform("times_of_tick")
        spread = torch.tensor([i * GOLDEN % 1 for i in draw.indices], dtype=torch.float32)
        return (first + spread.to(first.device, non_blocking=True)) % 1
    if config.weighting_scheme == "logit_normal":
        return 1 - draw.logit_normal("time", config.logit_mean, config.logit_std)
    rank = draw.uniform("time")
    if config.weighting_scheme == "mode":  # eq. 20: f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u)
        u = 1 - rank
        rank = u + config.mode_scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    return rank


def time_weight(scheme: str, t: Tensor) -> Tensor | None:
    """(B,): what a row's loss is multiplied with; None: all count alike."""
    if scheme == "sigma_sqrt":
        return t.clamp(min=LEAST_TIME) ** -2
    if scheme == "cosmap":  # eq. 21: 2 / (pi - 2 pi t + 2 pi t^2)
        return 2 / (torch.pi * (1 - 2 * t + 2 * t**2))
    return None
