"""pi-Flow's policy (arXiv 2510.14974, section 3 and appendix F): a Gaussian mixture for the clean latent, as in GMFlow.

The network says what it believes of x0 at the segment's source; at any later (x, sigma) the belief is conditioned on having
come there (Bayes' rule, in closed form), and its mean gives the velocity.  So unlike ArcFlow's it depends on x, and is
followed in many cheap substeps.

Shapes: B rows; K components; C H W latent; sigma, a, b are (B,) times of the flow, 1 = noise, with a >= b.  Everything is
pure, and fp32 unless it is given in fp64.

Departures from the published code:
1. All that is divided by sigma^2 is multiplied through, and the velocity is written without x - x0: no floor under sigma.
2. A way is divided into equal substeps of raw time, as near to 1/128 as possible, so that it ends where it was to end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train_t2i.policies import RAW_SUBSTEPS, Policy, drop_gates, precise, split_channels, unshift_time
from train_t2i.schedule import per_row, shift_time


def substeps(a: Tensor, b: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """The times (B, n + 1) of Euler's substeps from a to b, and the share (B, n) that each has in the way a - b.

    Rows with a shorter way than the longest stay at b, with shares of 0; a row without a way has its one share at a.
    """
    raw_a, raw_b = unshift_time(a, shift), unshift_time(b, shift)
    counts = ((raw_a - raw_b) * RAW_SUBSTEPS).round().clamp(min=1)
    index = torch.arange(int(counts.max()) + 1, device=a.device)
    done = (index / counts[:, None]).clamp(max=1)  # of the way, in raw time
    start, end = a[:, None], b[:, None]
    times = shift_time(torch.lerp(raw_a[:, None], raw_b[:, None], done), shift)
    times = torch.where(done == 0, start, torch.where(done == 1, end, times))  # there and back again is not exact
    widths = times[:, :-1] - times[:, 1:]
    shares = torch.where(start > end, widths / (start - end).clamp(min=torch.finfo(a.dtype).tiny), index[:-1] == 0)
    return times, shares


@dataclass(frozen=True)
class GMFlowPolicy(Policy):
    """x0 given x_source ~ sum_k p_k N(mu_k, std^2), followed by Euler substeps of 1/128 in raw time."""

    means: Tensor  # (B, K, C, H, W) of the clean latent
    log_gates: Tensor  # (B, K, 1, H, W) ln p, up to a number a pixel: they are normalised here
    log_std: Tensor  # (B,) of the clean latent, one for all components and pixels
    x_source: Tensor  # (B, C, H, W) what the network was called on
    source: Tensor  # (B,) sigma that it was called at
    shift: float  # from raw time to sigma

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        x, x_source, means = precise(x), precise(self.x_source), precise(self.means)
        sigma, source = per_row(precise(sigma), x), per_row(precise(self.source), x)
        variance = per_row(precise(self.log_std).mul(2).exp(), x)
        alpha, ratio = 1 - sigma, (1 - source) / source
        # p(x0 | x, x_source) ~ p(x0 | x_source) exp(<x0, nu> - zeta |x0|^2 / 2), where, times sigma^2,
        # zeta = (alpha / sigma)^2 - (alpha_s / sigma_s)^2,  nu = alpha x / sigma^2 - alpha_s x_s / sigma_s^2
        zeta = alpha**2 - (sigma * ratio) ** 2
        nu = alpha * x - sigma**2 * ratio * x_source / source
        total = variance * zeta + sigma**2
        # logits_k = ln p_k + <mu_k, nu - zeta mu_k / 2>_C / (std^2 zeta + 1)
        agreement = (means * (nu[:, None] - 0.5 * zeta[:, None] * means)).sum(dim=2, keepdim=True)
        gates = (precise(self.log_gates).log_softmax(dim=1) + agreement / total[:, None]).softmax(dim=1)
        mean = (gates * means).sum(dim=1)
        # u = (x - x0) / sigma with x0 = sum_k gate_k (std^2 nu + mu_k) / (std^2 zeta + 1); alpha^2 - alpha = -alpha sigma
        spread = alpha * x + sigma * ratio * (ratio * x - x_source / source)
        return (sigma * (x - mean) - variance * spread) / total

    def mean_velocity(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, a, b = precise(x), precise(a), precise(b)
        times, shares = substeps(a, b, self.shift)
        mean = torch.zeros_like(x)
        for i in range(shares.shape[1]):
            # rows that have arrived are held, and asked at a: the velocity at b, which may be 0, is nobody's business
            velocity = self.velocity(x, torch.where(shares[:, i] > 0, times[:, i], a))
            x = x - per_row(times[:, i] - times[:, i + 1], x) * velocity
            mean = mean + per_row(shares[:, i], x) * velocity
        return mean

    def detach(self) -> GMFlowPolicy:
        means, log_gates, log_std = self.means.detach(), self.log_gates.detach(), self.log_std.detach()
        return GMFlowPolicy(means, log_gates, log_std, self.x_source.detach(), self.source.detach(), self.shift)

    def with_dropped(self, mask: Tensor) -> GMFlowPolicy:
        return replace(self, log_gates=drop_gates(self.log_gates, mask))

    def with_temperature(self, temperature: float) -> GMFlowPolicy:
        """For sampling, below 1: surer of its components, and of each; not for the last step (pi-Flow: 0.3 of 4 steps)."""
        # logits / T, variance T
        log_std = self.log_std + 0.5 * math.log(temperature)
        return replace(self, log_gates=self.log_gates / temperature, log_std=log_std)


def split_gmflow(
    out: Tensor, log_std: Tensor, num_components: int, channels: int, x_source: Tensor, source: Tensor, shift: float
) -> GMFlowPolicy:
    """The policy in a network's output (B, K C + K, H, W), called on ``x_source`` (B, C, H, W) at ``source`` (B,).

    Its channels are velocities (all of component 0, then of 1, ...) and the gates; ``log_std`` is (B,), of a velocity.
    """
    velocities, log_gates = split_channels(out, [num_components * channels, num_components])
    x_source, source = precise(x_source), precise(source)
    by_component = velocities.unflatten(1, (num_components, channels))
    # mu^x_k = x_s - sigma_s mu_k,  std^x = sigma_s std
    means = x_source[:, None] - per_row(source, by_component) * by_component
    clean_log_std = precise(log_std) + source.log()
    return GMFlowPolicy(means, log_gates.unsqueeze(2), clean_log_std, x_source, source, shift)
