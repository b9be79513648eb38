"""Regression on the teacher's own samples: the same noise, the same prompt, the student's whole sampler, one MSE.

At one step this is the ODE initialisation of DMD and DMD2 (arXiv 2405.14867 section 4.1) on stored pairs.
Shapes: B rows; C H W latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from train_t2i import losses
from train_t2i.config import ODEConfig
from train_t2i.families.base import Cond
from train_t2i.methods.base import Batch, Clock, Metrics, Setting, sample_student
from train_t2i.networks import Role


class Direct:
    uses: tuple[Role, ...] = ("generator",)
    trains: tuple[Role, ...] = ("generator",)
    data = "pairs"
    parts = 1

    def __init__(self, config: ODEConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.columns: dict[Role, tuple[str, ...]] = {"generator": ("loss",)}

    def roles_at(self, clock: Clock) -> tuple[Role, ...]:
        return ("generator",)

    def rollout(self, batch: Batch, clock: Clock) -> tuple[Batch, Cond]:
        return batch, self.setting.family.encode(batch.prompts, None)

    def losses(self, role: Role, rollout: tuple[Batch, Cond], clock: Clock) -> Iterator[tuple[Tensor, Metrics]]:
        batch, cond = rollout
        assert batch.noise is not None
        assert batch.latents is not None
        draw = self.setting.draw(clock, batch.indices)
        noise = batch.noise.to(self.setting.device)
        sample = self.sample(cond, noise, lambda i: draw.normal(f"renoise/{i}", self.setting.latent_shape))
        loss = losses.regression(sample, batch.latents.to(self.setting.device))
        yield loss, {"loss": loss.detach()}

    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        return sample_student(self.setting, cond, noise, renoise)
