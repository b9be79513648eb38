"""What a few-step student says of a whole segment: a velocity for every time in it, from one call of the network.

ArcFlow (arXiv 2602.09014) mixes K velocities whose strengths grow or fade exponentially with time, so that the way to any
later time is a closed form.  pi-Flow (arXiv 2510.14974) introduced the idea and the training; its policy is in gmflow.py.

Shapes: B rows; K components; C H W latent; sigma, a, b are (B,) times of the flow, 1 = noise, with a >= b; raw time is in
[0, 1] too, and ``schedule.shift_time`` turns it into sigma.  Everything is pure, and fp32 unless it is given in fp64.

Departures from ArcFlow's published code:
1. The mean velocity is a sum of closed forms, through ``phi``, and not the difference of two positions over a small gap:
   no cancellation, no floor under the gap, a gradient at log-momentum 0.
2. Log-momenta are bounded, with ``bound_log_momentum``; theirs overflow fp32 at 88.
3. Gates are normalised once, here, in fp32.
4. A sum over the product of weights and velocities, and no einsum: for more than one row that saves a copy of all K
   velocities a call, and it is a matrix product, which a GPU rounds where TF32 is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from train_t2i.schedule import per_row

PHI_SERIES_BELOW = 1e-2
EXACT_LOG_MOMENTUM = 6.0  # ArcFlow starts from ln 0.2 = -1.6 to ln 4 = 1.4
MAX_LOG_MOMENTUM = 8.0
RAW_SUBSTEPS = 128  # pi-Flow: the substeps that a whole trajectory, raw time 1 to 0, is divided into


def precise(values: Tensor) -> Tensor:
    """In the precision that policies compute in: fp64 stays, all else becomes fp32."""
    return values if values.dtype == torch.float64 else values.float()


# -- times -----------------------------------------------------------------------------------------------------------


def unshift_time(sigma: Tensor, shift: float) -> Tensor:
    """The raw time whose ``schedule.shift_time`` is ``sigma``; any shape."""
    return sigma / (shift + (1 - shift) * sigma)


def match_window(length: float, window_substeps: float = 3.0, total_substeps: int = RAW_SUBSTEPS) -> float:
    """Raw time over which the policy's mean is matched to the teacher's velocity, in a segment of raw ``length``.

    So the student imitates a teacher of total / window substeps of Euler (43: pi-Flow, appendix B.3).
    """
    # w = min(W l / max(1, round(S l)), l)
    return min(window_substeps * length / max(1, round(total_substeps * length)), length)


def query_intervals(
    uniform_student: Tensor, uniform_teacher: Tensor, reach: Tensor | float, mixing: float
) -> tuple[Tensor, Tensor]:
    """Raw times to go by the student, and then by the teacher, to and from each of n queries in a segment.

    ``uniform_student`` (B, n) and ``uniform_teacher`` (B, n - 1) are draws from [0, 1); ``reach``, (B,) or for all rows, is
    the segment's raw length less the match window; ``mixing`` falls from 1 (queries on the teacher's path) to 0 (on the
    student's own).  Gives the two gaps (B, n), in the order in which they are gone: the student's leave a rest of
    (1 - mixing) reach, the teacher's sum to mixing * reach.
    """
    student, teacher = precise(uniform_student), precise(uniform_teacher)
    reach = torch.as_tensor(reach, dtype=student.dtype).to(student.device, non_blocking=True).reshape(-1, 1)
    start = torch.zeros_like(student[:, :1])
    # delta^S_j = (1 - rho) R (u_(j) - u_(j-1)), u_(0) = 0:  n draws in order, from the start of the segment
    ours = torch.cat([start, student.sort(dim=1).values], dim=1).diff(dim=1)
    # delta^T_j = rho R (u_(j) - u_(j-1)), u_(0) = 0, u_(n) = 1:  n - 1 draws, and both ends
    theirs = torch.cat([start, teacher.sort(dim=1).values, torch.ones_like(start)], dim=1).diff(dim=1)
    return (1 - mixing) * reach * ours, mixing * reach * theirs


# -- policies --------------------------------------------------------------------------------------------------------


class Policy(Protocol):
    """A velocity dx / dsigma of the flow for every time of a segment; x is (B, C, H, W), and so is what is returned."""

    def mean_velocity(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Of the way that leads from ``x`` at time a to time b; at a = b the velocity itself."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor: ...

    def detach(self) -> Self: ...

    def with_dropped(self, mask: Tensor) -> Self:
        """Without the components where ``mask`` (B, K) bool is true; the others' gates again sum to 1."""
        ...

    def step(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Where ``x`` at time a is at time b."""
        return precise(x) - per_row(precise(a) - precise(b), x) * self.mean_velocity(x, a, b)


def drop_gates(log_gates: Tensor, mask: Tensor) -> Tensor:
    """(B, K, 1, H, W) with gates of exactly 0 where ``mask`` (B, K) is true; a row that would lose all keeps all."""
    dropped = mask & ~mask.all(dim=1, keepdim=True)
    return log_gates.masked_fill(dropped[:, :, None, None, None], -torch.inf)


def phi(z: Tensor) -> Tensor:
    """(e^z - 1) / z, and 1 at z = 0, with a finite gradient everywhere (1/2 at 0); any shape."""
    small = z.abs() < PHI_SERIES_BELOW
    # the branch not taken must be finite as well: its gradient is multiplied by 0, not left out
    divisor = torch.where(small, 1, z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return torch.where(small, series, torch.expm1(divisor) / divisor)


def bound_log_momentum(log_momenta: Tensor) -> Tensor:
    """Within (-8, 8): the identity up to 6, then a tanh that joins it with equal slope; any shape.

    A plain ``8 tanh(g / 8)`` would change every momentum (3 to 2.98), and a clamp would leave those beyond without a
    gradient to come back by.
    """
    room = MAX_LOG_MOMENTUM - EXACT_LOG_MOMENTUM
    exact = log_momenta.clamp(-EXACT_LOG_MOMENTUM, EXACT_LOG_MOMENTUM)
    return exact + room * torch.tanh((log_momenta - exact) / room)


@dataclass(frozen=True)
class MomentumPolicy(Policy):
    """ArcFlow's: v(sigma) = sum_k p_k mu_k gamma_k^(source - sigma), a function of time alone.

    A momentum above 1 speeds up on the way to the data, one below 1 fades; component 0 has momentum 1.  As ``x`` does not
    matter, ways add up exactly: a to b and b to c is a to c.
    """

    means: Tensor  # (B, K, C, H, W) mu
    log_gates: Tensor  # (B, K, 1, H, W) ln p, up to a number a pixel: they are normalised here
    log_momenta: Tensor  # (B, K - 1, 1, H, W) ln gamma of components 1 to K - 1, bounded here; K = 1: an Euler step
    source: Tensor  # (B,) sigma that the network was called at

    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, K, 1, H, W): how much of each component is in the mean velocity from time a to time b <= a."""
        gates = precise(self.log_gates).softmax(dim=1)
        constant = torch.zeros_like(gates[:, :1])
        log_momenta = torch.cat([constant, bound_log_momentum(precise(self.log_momenta))], dim=1)
        source, start, end = (per_row(precise(time), gates) for time in (self.source, a, b))
        # w_k = p_k gamma_k^(source - a) phi(ln gamma_k (a - b)): the integral of gamma_k^(source - s), s in [b, a], over a - b
        return gates * torch.exp(log_momenta * (source - start)) * phi(log_momenta * (start - end))

    def mean_velocity(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # D / (a - b) = sum_k w_k mu_k;  x, which other policies depend on, is not looked at
        return (self.weights(a, b) * precise(self.means)).sum(dim=1)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mean_velocity(x, sigma, sigma)

    def detach(self) -> MomentumPolicy:
        means, log_gates, log_momenta = self.means.detach(), self.log_gates.detach(), self.log_momenta.detach()
        return MomentumPolicy(means, log_gates, log_momenta, self.source.detach())

    def with_dropped(self, mask: Tensor) -> MomentumPolicy:
        return replace(self, log_gates=drop_gates(self.log_gates, mask))


def split_momentum(out: Tensor, num_components: int, channels: int, source: Tensor) -> MomentumPolicy:
    """The policy in a network's output (B, K C + K + K - 1, H, W), called at ``source`` (B,).

    Its channels are the means (all of component 0, then of 1, ...), the gates and the log-momenta.
    """
    sizes = [num_components * channels, num_components, num_components - 1]
    means, log_gates, log_momenta = split_channels(out, sizes)
    by_component = means.unflatten(1, (num_components, channels))
    return MomentumPolicy(by_component, log_gates.unsqueeze(2), log_momenta.unsqueeze(2), precise(source))


def split_channels(out: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """(B, sum of sizes, H, W) -> one (B, size, H, W) each, precise."""
    if out.shape[1] != sum(sizes):
        raise ValueError(f"the network gives {out.shape[1]} channels, and a policy is made of {sum(sizes)}")
    return precise(out).split(sizes, dim=1)
