"""ArcFlow (arXiv 2602.09014) and, as another policy of the same training, pi-Flow (arXiv 2510.14974).

One call of the student at the start of a segment says a velocity for every time in it.  Training needs prompts alone: the
student's own way is followed to random times, the teacher is asked there, and the student's mean velocity over a short
window is matched to its answer.  The next segment begins where the student's way ended.
Shapes: B rows; C H W latent; n queries; times are (B,) fp32: tau raw, sigma = ``shift_time(tau)``, 1 = noise.

Departures from the published code:
1. The mean velocity and the momenta's bound: see policies.py.
2. Each segment is back-propagated by itself, before the next is begun: the gradients are the same, the memory is one's.
3. Where the way is all the student's own (mixing 0), the teacher's n queries are one batch: nothing depends on its answers.
4. No dropout in the LoRA: a row's result then depends on nothing but the row.
5. Gradients are clipped from the first step, not from the hundredth on.
6. The guided teacher is the one that its pipeline samples (Qwen-Image's keeps the length of the conditional velocity).
7. gmflow: the deviation is read off the tokens, whose mean it is, not off the time embedding; segments are equally long.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train_t2i import losses
from train_t2i.adapters import replace_layer
from train_t2i.errors import UserError
from train_t2i.families.base import Cond, Family
from train_t2i.gmflow import GMFlowPolicy, split_gmflow
from train_t2i.method_configs import ArcFlowConfig
from train_t2i.methods.base import Batch, Clock, Method, Metrics, Setting
from train_t2i.networks import Role
from train_t2i.policies import Policy, match_window, query_intervals, split_momentum
from train_t2i.policy_head import PolicyHead
from train_t2i.randomness import Draw
from train_t2i.sampling import rows_at
from train_t2i.schedule import per_row, power_decay, shift_time

LOSS_SCALE = 15.0  # ArcFlow: 30 times half of the mean squared error


@dataclass(frozen=True)
class Query:
    """Where the teacher is asked, and the window after it in which the student's mean velocity should be its answer."""

    x: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    window_end: Tensor  # (B,)
    left_at: Tensor  # (B,) where the teacher's own step from here ends
    velocity: Tensor  # (B, C, H, W) the teacher's


@dataclass(frozen=True)
class Rollout:
    cond: Cond
    draw: Draw
    noise: Tensor  # (B, C, H, W)


class ArcFlow(Method):
    uses: tuple[Role, ...] = ("generator", "teacher")
    trains: tuple[Role, ...] = ("generator",)
    data = "prompts"

    def __init__(self, config: ArcFlowConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.shift = setting.family.path.shift
        self.parts = len(setting.grid) - 1
        segments = (f"loss_segment_{i}" for i in range(self.parts))
        self.columns: dict[Role, tuple[str, ...]] = {"generator": ("loss", *segments, "mixing")}

    @staticmethod
    def lora_targets(family: Family) -> tuple[str, ...]:
        """Feed-forward layers and the time embedding.  Raises UserError for a family whose head cannot be another."""
        if not family.policy_targets:
            raise UserError(
                "--method arcflow is for flux and qwen_image", "take --method dmdr or direct for this model"
            )
        return family.policy_targets

    @staticmethod
    def adapt(net: nn.Module, adapter: str, config: ArcFlowConfig) -> None:
        """A head that says a policy, and a copy of the normalisation before it to train."""
        replace_layer(net, "norm_out", adapter, copy.deepcopy)
        replace_layer(net, "proj_out", adapter, lambda base: PolicyHead(base, config.policy, config.num_components))

    def ema_decay(self, step: int) -> float | None:
        return power_decay(step, self.config.ema_start, self.config.ema_power)

    def mixing(self, step: int) -> float:
        """From 1, the teacher's way, to 0, the student's own."""
        return max(0.0, 1 - step / self.config.mixing_steps) if self.config.mixing_steps else 0.0

    @torch.no_grad()
    def rollout(self, batch: Batch, clock: Clock) -> Rollout:
        negative = self.config.negative_prompt if self.config.distill_cfg > 1 else None
        draw = self.setting.draw(clock, batch.indices)
        return Rollout(
            self.setting.family.encode(batch.prompts, negative, batch.sources),
            draw,
            draw.normal("noise", self.setting.latent_shape),
        )

    def losses(self, role: Role, rollout: Rollout, clock: Clock) -> Iterator[tuple[Tensor, Metrics]]:
        """One a segment, in their order: what is yielded must be back-propagated before the next is asked for."""
        x, mixing = rollout.noise, self.mixing(clock.step)
        for i in range(self.parts):
            loss, x = self._segment(role, rollout, x, i, mixing)
            reported = loss.detach()
            # sum_s l_s L_s with equal lengths l_s, which sum to 1
            yield (
                loss / self.parts,
                {"loss": reported, f"loss_segment_{i}": reported, "mixing": reported.new_full((), mixing)},
            )

    def _segment(self, role: Role, rollout: Rollout, x: Tensor, i: int, mixing: float) -> tuple[Tensor, Tensor]:
        """(loss of the segment, where its way ends (B, C, H, W))."""
        source, end = self._ends(x, i)
        policy = self._policy(role, x, source, rollout.cond)
        with torch.no_grad():
            way = self._way(policy, rollout.draw, i)
            queries, x = self._queries(way, rollout, x, i, mixing)
        total = x.new_zeros(())
        for query in queries:
            total = total + losses.regression(
                policy.mean_velocity(query.x, query.sigma, query.window_end), query.velocity
            )
        return LOSS_SCALE * total / len(queries), way.step(x, queries[-1].left_at, end)

    def _ends(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Two (B,): the times between which segment i lies."""
        grid = self.setting.grid.to(x.device, non_blocking=True)
        return rows_at(grid[i], x), rows_at(grid[i + 1], x)

    def _way(self, policy: Policy, draw: Draw, i: int) -> Policy:
        """The policy that leads to the queries: without a graph, and without some of its components, each row its own."""
        count = self.config.num_components
        dropped = draw.uniforms(f"gate_dropout/{i}", count) < self.config.gate_dropout
        return policy.detach().with_dropped(dropped)

    def _queries(self, way: Policy, rollout: Rollout, x: Tensor, i: int, mixing: float) -> tuple[list[Query], Tensor]:
        """(what the teacher says at n times of segment i, where the last query's teacher step ends).

        By turns along the student's way and along the teacher's: the latter's share is ``mixing`` (pi-Flow, section 5.1).
        """
        config, draw, n = self.config, rollout.draw, self.config.num_queries
        window = match_window(1 / self.parts, config.window_substeps)
        ours, theirs = query_intervals(
            draw.uniforms(f"student_gap/{i}", n),
            draw.uniforms(f"teacher_gap/{i}", n - 1),
            1 / self.parts - window,
            mixing,
        )
        sigma, _ = self._ends(x, i)
        tau = torch.full_like(sigma, 1 - i / self.parts)
        places, velocities = [], []
        for j in range(n):
            tau_a = (tau - ours[:, j]).clamp(min=0)
            a = shift_time(tau_a, self.shift)
            x = x_a = way.step(x, sigma, a)
            tau = (tau_a - theirs[:, j]).clamp(min=0)
            sigma = shift_time(tau, self.shift)
            if mixing > 0:
                velocities += self._teacher([x_a], [a], rollout.cond)
                x = x_a + per_row(sigma - a, x) * velocities[-1]
            places.append((x_a, a, shift_time((tau - window).clamp(min=0), self.shift), sigma))
        if mixing == 0:  # nothing on the way depends on what the teacher says
            velocities = self._teacher([x_a for x_a, *_ in places], [a for _, a, *_ in places], rollout.cond)
        return [Query(*place, velocity) for place, velocity in zip(places, velocities, strict=True)], x

    def _teacher(self, xs: list[Tensor], sigmas: list[Tensor], cond: Cond) -> list[Tensor]:
        """The teacher's velocities at several states of the same rows, in one call."""
        conds = Cond.cat([cond] * len(xs)) if len(xs) > 1 else cond
        cfg = self.config.distill_cfg
        out = self.setting.networks.predict("teacher", torch.cat(xs), torch.cat(sigmas), conds, cfg=cfg)
        return list(out.chunk(len(xs)))

    def _policy(self, role: Role, x: Tensor, source: Tensor, cond: Cond) -> Policy:
        out = self.setting.networks.predict(role, x, source, cond)
        count, channels = self.config.num_components, x.shape[1]
        if self.config.policy == "momentum":
            return split_momentum(out, count, channels, source)
        log_std = out[:, -1].mean(dim=(1, 2))
        return split_gmflow(out[:, :-1], log_std, count, channels, x, source, self.shift)

    @torch.no_grad()
    def sample(self, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        """(B, C, H, W): one call a segment."""
        x = noise
        for i in range(self.parts):
            source, end = self._ends(x, i)
            policy = self._policy("generator", x, source, cond)
            if isinstance(policy, GMFlowPolicy) and i < self.parts - 1:
                policy = policy.with_temperature(self.config.temperature)
            x = policy.step(x, source, end)
        return x
