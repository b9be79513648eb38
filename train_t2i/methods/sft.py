"""Supervised training: the denoising loss on image-text pairs, with caption dropout for classifier-free guidance.

Shapes: B rows; C H W latent; t (B,) fp32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train_t2i import losses
from train_t2i.config import SFTConfig
from train_t2i.families.base import Cond
from train_t2i.methods.base import Batch, Clock, Metrics, Setting, drop_captions
from train_t2i.networks import Role
from train_t2i.randomness import Draw
from train_t2i.sampling import many_step
from train_t2i.schedule import TimeSampler


@dataclass(frozen=True)
class Rollout:
    cond: Cond
    draw: Draw
    latents: Tensor  # (B, C, H, W)


class SFT:
    uses: tuple[Role, ...] = ("generator",)
    trains: tuple[Role, ...] = ("generator",)
    data = "images"
    parts = 1
    times = TimeSampler("uniform", low=0.0, high=1.0)

    def __init__(self, config: SFTConfig, setting: Setting, num_steps: int = 25, cfg: float = 7.0) -> None:
        self.config, self.setting, self.num_steps, self.cfg = config, setting, num_steps, cfg
        self._cached: dict[int, Tensor] = {}
        self.columns: dict[Role, tuple[str, ...]] = {"generator": ("loss",)}

    def roles_at(self, clock: Clock) -> tuple[Role, ...]:
        return ("generator",)

    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        family, draw = self.setting.family, self.setting.draw(clock, batch.indices)
        dropped = draw.uniform("caption_dropout") < self.config.caption_dropout
        cond = drop_captions(family.encode(batch.prompts, ""), dropped)
        return Rollout(cond, draw, self._latents(batch))

    def _latents(self, batch: Batch) -> Tensor:
        """(B, C, H, W).  For the cache rows are encoded one by one: a latent must not depend on its batch, or a resumed
        run, which fills the cache in other batches, would differ in the last bits."""
        assert batch.images is not None
        encode, images = self.setting.family.to_latents, batch.images.to(self.setting.device)
        if not self.config.cache_latents:
            return encode(images)
        for row, image in zip(batch.rows, images, strict=True):
            if row not in self._cached:
                self._cached[row] = encode(image[None])[0]
        return torch.stack([self._cached[row] for row in batch.rows])

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
