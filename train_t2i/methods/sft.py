"""Supervised training: the denoising loss on image-text pairs, with caption dropout for classifier-free guidance.

Shapes: B rows; C H W latent; t (B,) fp32 in [0, 1].
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
from train_t2i.schedule import TimeSampler


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
    times = TimeSampler("uniform", low=0.0, high=1.0)

    def __init__(self, config: SFTConfig, setting: Setting, num_steps: int = 25, cfg: float = 7.0) -> None:
        self.config, self.setting, self.num_steps, self.cfg = config, setting, num_steps, cfg
        self._cached: dict[int, tuple[Cond, Tensor]] = {}
        self.columns: dict[Role, tuple[str, ...]] = {"generator": ("loss",)}

    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        draw = self.setting.draw(clock, batch.indices)
        cond, latents = self._from_cache(batch) if self.config.cache_rows else self._encode(batch)
        dropped = draw.uniform("caption_dropout") < self.config.caption_dropout
        return Rollout(drop_captions(cond, dropped), draw, latents)

    def _encode(self, batch: Batch) -> tuple[Cond, Tensor]:
        assert batch.images is not None
        family = self.setting.family
        return family.encode(batch.prompts, ""), family.to_latents(batch.images.to(self.setting.device))

    def _from_cache(self, batch: Batch) -> tuple[Cond, Tensor]:
        """Rows are encoded one by one: what is kept must not depend on the batch it came in, or a resumed run, which
        fills the cache in other batches, would differ in the last bits."""
        assert batch.images is not None
        for i, row in enumerate(batch.rows):
            if row not in self._cached:
                alone = replace(batch, prompts=batch.prompts[i : i + 1], images=batch.images[i : i + 1])
                self._cached[row] = self._encode(alone)
        conds, latents = zip(*(self._cached[row] for row in batch.rows), strict=True)
        return Cond.cat(conds), torch.cat(latents)

    def losses(self, role: Role, rollout: Rollout, clock: Clock) -> Iterator[tuple[Tensor, Metrics]]:
        path, x0 = self.setting.family.path, rollout.latents
        t = self.times.sample(rollout.draw, "time", clock.step)
        noise = rollout.draw.normal("noise", x0.shape[1:])
        out = self.setting.networks.predict(role, path.add_noise(x0, noise, t), t, rollout.cond)
        loss = losses.denoising(out, path.target(x0, noise, t))
        yield loss, {"loss": loss.detach()}

    @torch.no_grad()
    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        """Many guided steps: what is trained here is a teacher."""

        def x0_at(x: Tensor, t: Tensor) -> Tensor:
            return self.setting.networks.x0("generator", x, t, cond, cfg=self.cfg)

        return many_step(x0_at, self.setting.family.path, self.num_steps, noise)
