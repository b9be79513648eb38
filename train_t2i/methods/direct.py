"""Direct Distillation: the teacher's noise, the student's whole few-step sampler, one regression on the teacher's latent.

The teacher renders ahead of time (the pairs verb, or any table that names image, prompt and seed); training loads no
teacher.  The student starts from the same seeded noise, samples without guidance, and the gradient goes back through every
step (DiffSynth-Studio's Direct Distillation).  At one step this is the ODE initialisation of DMD2 (arXiv 2405.14867,
section 4.1).  Shapes: B rows; C H W latent; N steps.

Departures from DiffSynth-Studio's code:
1. The times are the grid that the student is sampled with, in fp32; there they were others than its pipeline's, in bf16.
2. SDXL starts from pure noise; there the target was mixed in.  Its grid spends no call at t = 0.
3. Images are encoded to the mean of the VAE's distribution, not to a draw from it; stored latents are taken as they are.
4. Batches of several rows; rows may have their own numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train_t2i import losses
from train_t2i.config import DirectConfig
from train_t2i.families.base import Cond
from train_t2i.methods.base import Batch, Clock, Method, Metrics, Setting, sample_student
from train_t2i.networks import Role
from train_t2i.randomness import seeded_noise
from train_t2i.sampling import trajectory


@dataclass(frozen=True)
class Rollout:
    cond: Cond
    noise: Tensor  # (B, C, H, W)
    target: Tensor  # (B, C, H, W) the teacher's result
    states: Tensor | None  # (B, N - 1, C, H, W) where the teacher was at the student's times
    grid: Tensor  # (N + 1,) or (B, N + 1)
    renoise: Callable[[int], Tensor] | None


class Direct(Method):
    uses: tuple[Role, ...] = ("generator",)
    trains: tuple[Role, ...] = ("generator",)
    data = "pairs"
    parts = 1

    def __init__(self, config: DirectConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        terms = ("loss_latent",) * self._has_terms
        terms += ("loss_states",) * (config.states_weight > 0) + ("loss_features",) * (setting.features is not None)
        self.columns: dict[Role, tuple[str, ...]] = {"generator": ("loss", *terms)}

    @property
    def _has_terms(self) -> bool:
        return self.config.states_weight > 0 or self.setting.features is not None

    @torch.no_grad()
    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        setting, family = self.setting, self.setting.family
        if batch.latents is not None:
            target = batch.latents.to(setting.device, non_blocking=True)
        else:
            assert batch.images is not None
            target = family.to_latents(batch.images.to(setting.device, non_blocking=True))
        shape = target.shape[1:]
        draw = setting.draw(clock, batch.indices)
        return Rollout(
            family.encode(batch.prompts, None, batch.sources),
            seeded_noise(batch.seeds, shape, batch.rand_devices).to(setting.device, non_blocking=True),
            target,
            None if batch.states is None else batch.states.to(setting.device, non_blocking=True),
            self._grid(batch.num_steps),
            (lambda i: draw.normal(f"renoise/{i}", shape)) if setting.sample_type == "sde" else None,
        )

    def _grid(self, num_steps: Sequence[int]) -> Tensor:
        """The run's own grid, or (B, N + 1) of each row's, filled up with 0.

        Where calls need all processes, N is the most that any row may have: all make as many.
        """
        most = self.config.max_row_steps
        if not most:
            return self.setting.grid
        longest = most if self.setting.calls_need_all else max(num_steps)
        grids = [self.setting.family.path.grid(n) for n in num_steps]
        return torch.stack([F.pad(grid, (0, longest + 1 - len(grid))) for grid in grids])

    def losses(self, role: Role, rollout: Rollout, clock: Clock) -> Iterator[tuple[Tensor, Metrics]]:
        config, networks = self.config, self.setting.networks
        states = trajectory(
            lambda x, t: networks.x0(role, x, t, rollout.cond), self.setting.family.path, rollout.grid, rollout.noise,
            rollout.renoise, backprop_steps=config.backprop_steps, recompute=config.step_checkpointing,
        )  # fmt: skip
        loss = losses.regression(states[-1], rollout.target, config.huber_delta)
        metrics = {"loss_latent": loss.detach()} if self._has_terms else {}
        if config.states_weight > 0:
            assert rollout.states is not None
            through = torch.stack(states[:-1], dim=1)
            loss_states = losses.regression(through, rollout.states, config.huber_delta)
            loss, metrics["loss_states"] = loss + config.states_weight * loss_states, loss_states.detach()
        if self.setting.features is not None:
            loss_features = self._feature_distance(states[-1], rollout.target)
            loss, metrics["loss_features"] = loss + config.feature_weight * loss_features, loss_features.detach()
        yield loss, metrics | {"loss": loss.detach()}

    def _feature_distance(self, sample: Tensor, target: Tensor) -> Tensor:
        assert self.setting.features is not None
        with torch.no_grad():
            wanted = self.setting.features(self.setting.family.decode(target, fast=True))
        return losses.feature_distance(self.setting.features(self.setting.family.decode(sample, fast=True)), wanted)

    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        return sample_student(self.setting, cond, noise, renoise)
