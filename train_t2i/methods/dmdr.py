"""DMDR: distribution matching distillation with rewards (arXiv 2511.13649; DMD, arXiv 2311.18828; DMD2, 2405.14867).

The guidance network learns the student's distribution at every tick; at every ``ratio_update``-th tick the generator
moves along the difference of the teacher's and the guidance network's scores and, after the cold start, up the rewards.
Shapes: B rows; C H W latent; t (B,) fp32 in [0, 1].

Departures from the paper and its published code:
1. Guidance weights are drawn a row, not a batch and process, so no result depends on how rows are batched.
2. Backward simulation ends for each row at the level that it drew; its later calls would not be used.
3. Times are clamped to [0.02, 0.98] (DMD2) instead of reaching 0 and 1.
4. The guidance network's times follow the same sampler as the scores' (the code hard-coded Beta(4, 1.5)).
5. With rectified flow the deterministic simulation ends at t = 0 instead of 0.001.
6. A non-finite update is skipped as a whole; NaNs are not replaced by zeros.
7. ``reuse_rollout`` orders a generator's tick as DMD2 does: the generator is updated on the input that its simulation has
   at each row's level, and the estimate made there is the sample that the guidance network then learns.
8. ``student_input`` path gives the generator the state that its deterministic sampling has at each row's level, as it is given
   at inference; the code noises its finished sample anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rewards.micro_batches import by_parts
from train_t2i import losses
from train_t2i.config import DMDRConfig
from train_t2i.families.base import Cond
from train_t2i.methods.base import Batch, Clock, Method, Metrics, RewardTerm, Setting, sample_student
from train_t2i.networks import Role
from train_t2i.randomness import Draw
from train_t2i.sampling import simulate_to, trajectory
from train_t2i.schedule import TimeSampler, cosine_fall, per_row


@dataclass
class Rollout:
    """What both updates of a tick share."""

    prompts: list[str]
    cond: Cond
    draw: Draw
    x0: Tensor  # (B, C, H, W) the student's estimate at its row's level; reused: one level before, until its update
    x_t: Tensor  # (B, C, H, W) the student's input there
    t: Tensor  # (B,)


class DMDR(Method):
    uses: tuple[Role, ...] = ("generator", "guidance", "teacher")
    trains: tuple[Role, ...] = ("generator", "guidance")
    data = "prompts"
    parts = 1

    def __init__(self, config: DMDRConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.networks, self.path = setting.networks, setting.family.path
        dynamic = config.dynamic_step
        self.level_times = TimeSampler(config.s_type_gen, config.gen_a, config.gen_b, dynamic)
        self.score_times = TimeSampler(config.s_type_gui, config.gui_a, config.gui_b, dynamic)
        reward_columns = [c for term in setting.rewards for c in (f"reward_{term.name}", f"loss_{term.name}")]
        self.columns: dict[Role, tuple[str, ...]] = {
            "generator": ("loss", "loss_dmd", "score_gap", *reward_columns),
            "guidance": ("loss",),
        }

    def roles_at(self, clock: Clock) -> tuple[Role, ...]:
        """Guidance always; the generator on every ratio-th tick, after it, or before where its estimate is reused."""
        if clock.tick_in_step + 1 < self.config.ratio_update:
            return ("guidance",)
        return ("generator", "guidance") if self.config.reuse_rollout else ("guidance", "generator")

    def borrowed_scale(self, step: int) -> float:
        """Dynamic distribution guidance: the real score borrows the guidance adapter, ever less (DMDR section 4.2)."""
        return self.config.lora_scale_r * cosine_fall(step, self.config.dynamic_step)

    @torch.no_grad()
    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        config, setting = self.config, self.setting
        guided = config.cfg_r > 1 or config.cfg_f > 1
        cond = setting.family.encode(batch.prompts, config.negative_prompt if guided else None, batch.sources)
        draw = setting.draw(clock, batch.indices)
        level = self.level_times.sample_index(draw.on_host(), "level", clock.step, setting.grid)
        at = level.to(setting.device, non_blocking=True)
        t = setting.grid.to(setting.device, non_blocking=True)[at]
        if config.student_input == "path":
            states = self._along_ode(cond, draw)
            x_t = torch.stack(states[:-1])[at, torch.arange(len(at), device=at.device)]
            return Rollout(batch.prompts, cond, draw, states[-1], x_t, t)
        reused = config.reuse_rollout and "generator" in self.roles_at(clock)
        x0 = self._estimated(cond, draw, level - 1, setting.grid[:-1]) if reused else self._simulated(cond, draw, level)
        fresh = draw.normal("student_input", setting.latent_shape)
        # At the top of its grid the student starts from pure noise, whatever level conditions it there.  Below, it is given
        # its own estimate, noised anew: that at its level or, where that is still to be made, at the level before (DMD2).
        x_t = torch.where(per_row(t == setting.grid[0], x0), fresh, self.path.add_noise(x0, fresh, t))
        return Rollout(batch.prompts, cond, draw, x0, x_t, t)

    def _simulated(self, cond: Cond, draw: Draw, level: Tensor) -> Tensor:
        """(B, C, H, W) what the student makes: along the ODE its finished sample, else its estimate at each row's level."""
        if self.setting.sample_type == "ode":
            return self._along_ode(cond, draw)[-1]
        return self._estimated(cond, draw, level, self.setting.grid)

    def _along_ode(self, cond: Cond, draw: Draw) -> list[Tensor]:
        """The student's N + 1 states (B, C, H, W), a grid time each, from noise to its finished sample."""
        noise = draw.normal("simulation/0", self.setting.latent_shape)
        x0_at = partial(self.networks.x0, "generator", cond=cond)
        return [noise, *trajectory(x0_at, self.path, self.setting.grid, noise, None)]

    def _estimated(self, cond: Cond, draw: Draw, level: Tensor, grid: Tensor) -> Tensor:
        """(B, C, H, W) the student's estimate at each row's level of ``grid``; zeros at level -1."""
        setting = self.setting
        return simulate_to(
            lambda x, t, rows: self.networks.x0("generator", x, t, cond.take(rows)),
            self.path,
            grid,
            draw.normal("simulation/0", setting.latent_shape),
            lambda i: draw.normal(f"simulation/{i}", setting.latent_shape),
            level,
            whole=setting.calls_need_all,
            least_rows=setting.least_rows,
        )

    def losses(self, role: Role, rollout: Rollout, clock: Clock) -> Iterator[tuple[Tensor, Metrics]]:
        yield self._guidance(rollout, clock) if role == "guidance" else self._generator(rollout, clock)

    def _guidance(self, rollout: Rollout, clock: Clock) -> tuple[Tensor, Metrics]:
        """Denoising on the student's samples (DMD2 eq. 3)."""
        draw = rollout.draw
        tau = self.score_times.sample(draw, "guidance_time", clock.step)
        noise = draw.normal("guidance_noise", self.setting.latent_shape)
        x_tau = self.path.add_noise(rollout.x0, noise, tau)
        out = self.networks.predict("guidance", x_tau, tau, rollout.cond, scale=self._fake_scale)
        loss = losses.denoising(out, self.path.target(rollout.x0, noise, tau))
        return loss, {"loss": loss.detach()}

    def _generator(self, rollout: Rollout, clock: Clock) -> tuple[Tensor, Metrics]:
        x0 = self.networks.x0("generator", rollout.x_t, rollout.t, rollout.cond)
        if self.config.reuse_rollout:
            rollout.x0 = x0.detach()
        loss, metrics = x0.new_zeros(()), {}
        if self.config.dmd_weight > 0:
            real, fake = self._scores(x0.detach(), rollout, clock)
            loss_dmd = losses.dmd(x0, real, fake)
            loss = loss + self.config.dmd_weight * loss_dmd
            metrics = {"loss_dmd": loss_dmd.detach(), "score_gap": (fake - real).abs().mean()}
        if self.setting.rewards and clock.step >= self.config.cold_start_iter:
            loss_rewards, reported = self.rewards(x0, rollout.prompts, clock.tick)
            loss, metrics = loss + clock.reward_scale * loss_rewards, metrics | reported
        return loss, metrics | {"loss": loss.detach()}

    def rewards(self, x0: Tensor, prompts: list[str], tick: int) -> tuple[Tensor, Metrics]:
        """(B, C, H, W) -> scalar: the weighted losses of all rewards; and what to report.  So many rows at a time are decoded."""
        reported = defaultdict(list)

        def losses_of(part: Tensor, first: int) -> Tensor:
            images, total = self.setting.family.decode(part, fast=True), x0.new_zeros(len(part))
            for term in self.setting.rewards:
                scores, found = reward_losses(term, images, prompts[first : first + len(part)], tick)
                total = total + term.weight * found
                reported[f"reward_{term.name}"].append(scores.detach())
                reported[f"loss_{term.name}"].append(found.detach())
            return total

        loss = by_parts(x0, losses_of, self.config.reward_batch_size or len(x0)).mean()
        return loss, {name: torch.cat(parts).mean() for name, parts in reported.items()}

    @torch.no_grad()
    def _scores(self, x0: Tensor, rollout: Rollout, clock: Clock) -> tuple[Tensor, Tensor]:
        """Two (B, C, H, W) clean estimates at one noised copy of ``x0``: the teacher's and the guidance network's."""
        config, draw, step = self.config, rollout.draw, clock.step
        tau = self.score_times.sample(draw, "score_time", step)
        x_tau = self.path.add_noise(x0, draw.normal("score_noise", self.setting.latent_shape), tau)
        real_cfg, fake_cfg = self._jittered(config.cfg_r, draw, "cfg_r"), self._jittered(config.cfg_f, draw, "cfg_f")
        scale = self.borrowed_scale(step)
        real = self.networks.x0("teacher", x_tau, tau, rollout.cond, cfg=real_cfg, scale=scale)
        fake = self.networks.x0("guidance", x_tau, tau, rollout.cond, cfg=fake_cfg, scale=self._fake_scale)
        return real, fake

    @property
    def _fake_scale(self) -> float:
        return self.config.lora_scale_f

    @staticmethod
    def _jittered(cfg: float, draw: Draw, stream: str) -> float | Tensor:
        """Guidance drawn within 0.5 of ``cfg``, a row; exactly 1 stays no guidance."""
        return draw.uniform(stream, cfg - 0.5, cfg + 0.5) if cfg > 1 else 1.0

    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        return sample_student(self.setting, cond, noise, renoise)


def reward_losses(term: RewardTerm, images: Tensor, prompts: list[str], tick: int) -> tuple[Tensor, Tensor]:
    """(B,) scores and (B,) losses of one reward; a weight of 0 watches without a graph."""
    with torch.set_grad_enabled(term.weight > 0):
        scores = term.score(images, term.prompts(prompts), tick=tick).float()
        return scores, -scores if term.margin is None else losses.hinge(scores, term.margin)
