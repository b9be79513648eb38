"""Policies against integrals, exact flows of known data and published numbers; mostly in fp64, values and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from train_t2i.gmflow import GMFlowPolicy, split_gmflow, substeps
from train_t2i.policies import (
    MomentumPolicy,
    Policy,
    bound_log_momentum,
    match_window,
    phi,
    query_intervals,
    split_momentum,
    unshift_time,
)
from train_t2i.schedule import RectifiedFlow, per_row, shift_time

SHIFT = 3.2  # ArcFlow's and pi-Flow's
ROWS, CHANNELS = 3, 2


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def times(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def momentum_policy(num_components: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> MomentumPolicy:
    """Three rows of 2 x 2 pixels whose sources differ."""
    means = normal(seed, ROWS, num_components, CHANNELS, 2, 2, dtype=dtype)
    log_gates = normal(seed + 1, ROWS, num_components, 1, 2, 2, dtype=dtype)
    log_momenta = 1.2 * normal(seed + 2, ROWS, num_components - 1, 1, 2, 2, dtype=dtype)
    return MomentumPolicy(means, log_gates, log_momenta, times(1.0, 0.9, 0.762, dtype=dtype))


def gmflow_policy(num_components: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> GMFlowPolicy:
    means = normal(seed, ROWS, num_components, CHANNELS, 2, 2, dtype=dtype)
    log_gates = normal(seed + 1, ROWS, num_components, 1, 2, 2, dtype=dtype)
    x_source = normal(seed + 2, ROWS, CHANNELS, 2, 2, dtype=dtype)
    log_std = times(-1.0, -0.5, -2.0, dtype=dtype)
    return GMFlowPolicy(means, log_gates, log_std, x_source, times(1.0, 0.9, 0.762, dtype=dtype), SHIFT)


START, MIDDLE, END = times(0.95, 0.9, 0.7), times(0.8, 0.3, 0.65), times(0.762, 0.0, 0.1)
X = normal(9, ROWS, CHANNELS, 2, 2)
BOTH = pytest.mark.parametrize("make", [momentum_policy, gmflow_policy])


# -- exact flows to compare with -------------------------------------------------------------------------------------


class Mixture:
    """Data from a mixture of equal Gaussians: its velocity, and what is known of x0 at any (x, sigma), exactly."""

    def __init__(self, modes: list[list[float]], std: float) -> None:
        self.modes = torch.tensor(modes, dtype=torch.float64)[None, :, :, None, None]  # (1, K, C, 1, 1)
        self.std = std

    def posterior(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, K, C, 1, 1), log gates (B, K, 1, 1, 1) and variance (B, 1, 1, 1, 1) of x0 given x at sigma."""
        x, time = x[:, None], per_row(sigma, x[:, None])
        variance = (1 - time) ** 2 * self.std**2 + time**2  # of x, given its mode
        off = x - (1 - time) * self.modes
        means = self.modes + (1 - time) * self.std**2 / variance * off
        log_gates = (-(off**2).sum(dim=2, keepdim=True) / (2 * variance)).log_softmax(dim=1)
        return means, log_gates, self.std**2 * time**2 / variance

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """u = (x - E[x0 | x]) / sigma."""
        means, log_gates, _ = self.posterior(x, sigma)
        return (x - (log_gates.exp() * means).sum(dim=1)) / per_row(sigma, x)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Along (N + 1,) times that all rows share."""
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * velocity(x, now.expand(len(x)))
    return x


GAUSSIAN = Mixture([[0.5]], 0.3)
CORNERS = Mixture([[1, 1], [-1, 1], [1, -1], [-1, -1]], 0.15)


def gaussian_path(x: Tensor, source: float, sigma: Tensor, mean: float, std: float) -> Tensor:
    """Where x at time ``source`` is at sigma, for data N(mean, std^2)."""

    def spread(time):
        return ((1 - time) ** 2 * std**2 + time**2) ** 0.5

    return (1 - sigma) * mean + spread(sigma) / spread(source) * (x - (1 - source) * mean)


def test_the_known_flow_has_the_published_numbers():
    """Reference 7.3: the teacher that the tests below compare with."""
    x, sigma = times(1.2, 1.2, 1.2, 0.6).reshape(4, 1, 1, 1), times(1, 0.8, 0.5, 0.1)
    assert_close(GAUSSIAN.velocity(x, sigma).flatten(), times(0.7, 0.836544438, 1.086238532, -0.465621230), 1e-9)
    path = gaussian_path(times(1.2), 1.0, times(0.761904762, 0.0), 0.5, 0.3)
    assert_close(path, times(1.037342401, 0.86), 1e-9)


# -- times -----------------------------------------------------------------------------------------------------------


def test_the_table_of_the_warp():
    raw = times(1, 0.75, 2 / 3, 0.5, 1 / 3, 0.25, 3 / 128, 1 / 128)
    sigma = times(1, 0.905660377, 0.864864865, 0.761904762, 0.615384615, 0.516129032, 0.071322437, 0.024577573)
    assert_close(shift_time(raw, SHIFT), sigma, 1e-9)
    assert_close(unshift_time(sigma, SHIFT), raw, 2e-9)
    at = times(1, 0.8, 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(shift_time(at, SHIFT).sum(), at)
    assert_close(slope, times(0.3125, 0.420079815, 0.725623583), 1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.2, 5.0])
def test_unshift_undoes_shift(shift):
    raw = torch.linspace(0, 1, 1001)
    assert_close(unshift_time(shift_time(raw, shift), shift), raw, 1e-6)


@pytest.mark.parametrize(
    ("num_steps", "sigmas"), [(1, [1, 0]), (2, [1, 0.761904762, 0]), (4, [1, 0.905660377, 0.761904762, 0.516129032, 0])]
)
def test_segments_lie_between_the_times_of_the_students_grid(num_steps, sigmas):
    """ArcFlow's published times; their raw times are evenly spaced."""
    grid = RectifiedFlow(SHIFT).grid(num_steps)
    assert_close(grid, torch.tensor(sigmas, dtype=torch.float32), 1e-6)
    assert_close(-unshift_time(grid, SHIFT).diff(), torch.full((num_steps,), 1 / num_steps), 1e-6)


def test_the_match_window():
    assert match_window(0.5) == match_window(1.0) == match_window(0.25) == 3 / 128
    assert match_window(2 / 7) == pytest.approx(3 * (2 / 7) / 37)  # 36.6 substeps: 37 that fill the segment
    assert match_window(1 / 64) == 1 / 64  # three substeps are more than all
    assert match_window(1 / 1000) == 1 / 1000
    assert match_window(0.5, window_substeps=1, total_substeps=64) == 1 / 64
    top = times(1, 0.75, 0.5, 0.25, 3 / 128)  # how wide it is in sigma
    width = shift_time(top, SHIFT) - shift_time(top - match_window(0.5), SHIFT)
    assert_close(width, times(0.0074, 0.0109, 0.0174, 0.0323, 0.0713), 5e-5)


# -- when the teacher is asked ---------------------------------------------------------------------------------------


def test_query_intervals_by_hand():
    draws = torch.tensor([[0.6, 0.2, 0.9]]), torch.tensor([[0.5, 0.25]])
    own, teachers = query_intervals(*draws, reach=0.4, mixing=0.25)
    assert_close(own, torch.tensor([[0.06, 0.12, 0.09]]), 1e-7)
    assert_close(teachers, torch.tensor([[0.025, 0.025, 0.05]]), 1e-7)
    own, teachers = query_intervals(*(d.expand(2, -1) for d in draws), reach=torch.tensor([0.4, 0.2]), mixing=0.25)
    assert_close(own[1], own[0] / 2, 1e-8)
    assert_close(teachers[1], teachers[0] / 2, 1e-8)


def test_query_intervals_at_the_ends_of_mixing():
    draws, reach = (uniform(0, 50, 4), uniform(1, 50, 3)), 0.5 - match_window(0.5)
    own, teachers = query_intervals(*draws, reach, mixing=1.0)
    assert torch.equal(own, torch.zeros(50, 4))
    assert_close(teachers.sum(dim=1), torch.full((50,), reach), 1e-6)
    own, teachers = query_intervals(*draws, reach, mixing=0.0)
    assert torch.equal(teachers, torch.zeros(50, 4))
    assert (own.sum(dim=1) <= reach).all()


@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_queries_are_in_order_and_leave_room_for_the_window(mixing):
    reach = 0.5 - match_window(0.5)
    own, teachers = query_intervals(uniform(0, 20_000, 4), uniform(1, 20_000, 3), reach, mixing)
    assert (own >= 0).all()
    assert (teachers >= 0).all()
    assert ((own + teachers).sum(dim=1) <= reach + 1e-6).all()
    order = torch.arange(1, 5)  # the mean of the j-th of n draws is j / (n + 1)
    assert_close(own.cumsum(dim=1).mean(dim=0), (1 - mixing) * reach * order / 5, 3e-3)
    assert_close(teachers.cumsum(dim=1).mean(dim=0), mixing * reach * order / 4, 3e-3)


def test_one_query_needs_no_draw_of_the_teacher():
    own, teachers = query_intervals(torch.tensor([[0.5]]), torch.zeros(1, 0), 0.4, 0.5)
    assert_close(torch.cat([own, teachers], dim=1), torch.tensor([[0.1, 0.2]]), 1e-7)


# -- phi and the bound -----------------------------------------------------------------------------------------------


def phi_by_series(z: float) -> tuple[float, float]:
    """Sum z^n / (n + 1)! and its derivative: exact here for |z| <= 10."""
    value = math.fsum(z**n / math.factorial(n + 1) for n in range(80))
    return value, math.fsum(n * z ** (n - 1) / math.factorial(n + 1) for n in range(1, 80))


@pytest.mark.parametrize(
    ("dtype", "value_error", "slope_error"), [(torch.float32, 1e-6, 3e-5), (torch.float64, 1e-12, 2e-10)]
)
def test_phi_and_its_slope(dtype, value_error, slope_error):
    sizes = torch.logspace(-8, 1, 400, dtype=dtype)
    z = torch.cat([sizes, -sizes, torch.zeros(1, dtype=dtype)]).requires_grad_()
    value = phi(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    expected = torch.tensor([phi_by_series(float(v)) for v in z.detach()], dtype=torch.float64)
    assert ((value.double() / expected[:, 0]) - 1).abs().max() < value_error
    assert ((slope.double() / expected[:, 1]) - 1).abs().max() < slope_error
    assert value[-1] == 1
    assert slope[-1] == 0.5


def test_phi_passes_gradcheck_through_zero():
    z = times(0, 1e-9, -1e-9, 1e-3, -1e-3, 0.0099, -0.0101, 0.5, -3, 5).requires_grad_()
    assert gradcheck(phi, z)


def test_phi_far_out_is_finite():
    z = torch.tensor([80.0, -80.0, 0.0], requires_grad=True)
    value = phi(z)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(z.grad).all()


def test_the_bound_is_exact_where_momenta_live_and_never_shuts():
    inside = torch.linspace(-6, 6, 101).requires_grad_()
    assert torch.equal(bound_log_momentum(inside), inside)
    assert torch.equal(torch.autograd.grad(bound_log_momentum(inside).sum(), inside)[0], torch.ones(101))
    assert_close(bound_log_momentum(times(-7, 7, 80)), times(-1, 1, 1) * (6 + 2 * times(0.5, 0.5, 37).tanh()), 1e-12)
    outside = times(-12, -6.0001, 6.0001, 7, 12).requires_grad_()
    assert gradcheck(bound_log_momentum, outside)
    (slope,) = torch.autograd.grad(bound_log_momentum(outside).sum(), outside)
    assert (slope > 0).all()
    assert (slope[[1, 2]] > 0.9999).all()  # it joins smoothly


@pytest.mark.parametrize("log_momentum", [0.0, 80.0, -80.0, 200.0, -200.0])
def test_wild_momenta_stay_finite_in_fp32(log_momentum):
    """Over the longest way, and after it, where e^(200 x 1) would be infinite."""
    policy = replace(momentum_policy(dtype=torch.float32), source=torch.ones(ROWS))
    wild = torch.full_like(policy.log_momenta, log_momentum).requires_grad_()
    whole = replace(policy, log_momenta=wild).step(X.float(), torch.ones(ROWS), torch.zeros(ROWS))
    last = replace(policy, log_momenta=wild).velocity(X.float(), torch.zeros(ROWS))
    (whole + last).sum().backward()
    assert torch.isfinite(whole + last).all()
    assert torch.isfinite(wild.grad).all()


# -- ArcFlow's policy ------------------------------------------------------------------------------------------------


def golden_policy() -> MomentumPolicy:
    def scalars(*values: float) -> Tensor:
        return times(*values).reshape(1, -1, 1, 1, 1)

    return MomentumPolicy(scalars(1, -2, 0.5), scalars(0.1, -0.3, 0.7), scalars(math.log(0.5), math.log(3)), times(1.0))


def test_golden_numbers_of_a_policy():
    """Reference 7.3."""
    policy, x = golden_policy(), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    one, middle = times(1.0), times(0.761904762)
    gates = policy.weights(one, one).flatten()
    assert_close(gates, times(0.286332859, 0.191934655, 0.521732486), 1e-9)
    for sigma, expected in ((1, 0.163329791), (0.9, 0.219328987), (0.761904762, 0.299722235)):
        assert float(policy.velocity(x, times(sigma))) == pytest.approx(expected, abs=1e-9)
    assert float(policy.mean_velocity(x, times(0.9), middle)) == pytest.approx(0.259183538, abs=1e-9)
    ways = {
        (0.9, 0.761904762): 0.035792012,
        (1, 0.761904762): 0.054912071,
        (0.761904762, 0): 0.429418987,
        (1, 0): 0.484331058,
    }
    for (a, b), expected in ways.items():
        assert float(x - policy.step(x, times(a), times(b))) == pytest.approx(expected, abs=1e-9)


def written_out(policy: MomentumPolicy, sigma: Tensor) -> Tensor:
    """v(sigma) = sum_k p_k mu_k gamma_k^(source - sigma), component by component."""
    unnormalised = policy.log_gates.exp()
    total = torch.zeros_like(policy.means[:, 0])
    for k in range(policy.means.shape[1]):
        momentum = policy.log_momenta[:, k - 1].exp() if k else torch.ones_like(policy.log_gates[:, 0])
        gone = (policy.source - sigma).reshape(-1, 1, 1, 1)
        total = total + unnormalised[:, k] / unnormalised.sum(dim=1) * policy.means[:, k] * momentum**gone
    return total


def simpson(policy: MomentumPolicy, a: Tensor, b: Tensor, intervals: int = 200) -> Tensor:
    """The integral of the velocity from b to a."""
    total = torch.zeros_like(policy.means[:, 0])
    for i in range(intervals + 1):
        weight = 1 if i in (0, intervals) else 4 if i % 2 else 2
        total = total + weight * written_out(policy, b + (a - b) * i / intervals)
    return total * per_row(a - b, total) / (3 * intervals)


def leaves(policy: MomentumPolicy) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        field.detach().clone().requires_grad_() for field in (policy.means, policy.log_gates, policy.log_momenta)
    )


def test_a_step_is_the_integral_of_the_velocity_in_value_and_gradient():
    policy = momentum_policy()
    ours, theirs = leaves(policy), leaves(policy)
    way = X - MomentumPolicy(*ours, policy.source).step(X, START, END)
    integral = simpson(MomentumPolicy(*theirs, policy.source), START, END)
    assert_close(way, integral, 1e-10)
    (way**2).sum().backward()
    (integral**2).sum().backward()
    for mine, exact in zip(ours, theirs):
        assert_close(mine.grad, exact.grad, 1e-9)


def test_euler_along_the_velocity_converges_to_the_step():
    policy = momentum_policy()
    exact = policy.step(X, START, END)

    def error(steps: int) -> float:
        x = X
        for i in range(steps):
            now = START + (END - START) * i / steps
            x = x + per_row(END - START, x) / steps * policy.velocity(x, now)
        return float((x - exact).abs().max())

    assert error(64) < 2e-2
    assert error(128) / error(64) == pytest.approx(0.5, rel=0.02)


def test_ways_add_up():
    policy = momentum_policy()
    two = policy.step(policy.step(X, START, MIDDLE), MIDDLE, END)
    assert_close(two, policy.step(X, START, END), 1e-12)


def test_the_end_of_a_segment_does_not_depend_on_where_the_student_was_asked():
    policy = momentum_policy(dtype=torch.float32)
    source, raw = policy.source, unshift_time(policy.source, SHIFT)
    own, _ = query_intervals(uniform(0, ROWS, 4), uniform(1, ROWS, 3), 0.3, mixing=0.0)
    x, now, end = X.float(), source, torch.full((ROWS,), 0.2)
    for gap in own.unbind(dim=1):
        raw = raw - gap
        then = shift_time(raw, SHIFT)
        x, now = policy.step(x, now, then), then
    assert_close(policy.step(x, now, end), policy.step(X.float(), source, end), 3e-6)


def test_the_velocity_is_the_limit_of_the_mean_and_the_slope_of_the_step():
    policy = momentum_policy()
    small = 1e-6
    velocity = policy.velocity(X, MIDDLE)
    assert_close(velocity, written_out(policy, MIDDLE), 1e-13)
    assert_close(policy.mean_velocity(X, MIDDLE, MIDDLE - small), velocity, 2e-5)
    slope = (policy.step(X, START, MIDDLE + small) - policy.step(X, START, MIDDLE - small)) / (2 * small)
    assert_close(slope, velocity, 1e-8)


@pytest.mark.parametrize("gap", [0.075, 1e-3, 1e-5, 0.0])
def test_small_gaps_lose_nothing_in_fp32(gap):
    """The difference of two positions over the gap is off by 1e-3 at 1e-4, and by 1 at 1e-5."""
    policy = momentum_policy(dtype=torch.float32)
    exact = MomentumPolicy(*(f.double() for f in (policy.means, policy.log_gates, policy.log_momenta, policy.source)))
    a, b = MIDDLE.float(), (MIDDLE - gap).float()
    ours = policy.mean_velocity(X.float(), a, b)
    assert_close(ours.double(), exact.mean_velocity(X, a.double(), b.double()), 3e-6)


def test_without_momentum_a_step_is_eulers():
    def eulers(policy: MomentumPolicy) -> Tensor:
        return X - (START - END).reshape(-1, 1, 1, 1) * (policy.log_gates.softmax(dim=1) * policy.means).sum(dim=1)

    one = momentum_policy(num_components=1)
    assert one.log_momenta.shape[1] == 0
    assert torch.equal(one.step(X, START, END), eulers(one))
    still = momentum_policy()
    still = replace(still, log_momenta=torch.zeros_like(still.log_momenta))
    assert_close(still.step(X, START, END), eulers(still), 1e-15)


def test_neither_the_order_of_components_nor_the_level_of_gates_matters():
    policy = momentum_policy(num_components=5)
    order = torch.tensor([0, 3, 1, 4, 2])
    turned = replace(
        policy,
        means=policy.means[:, order],
        log_gates=policy.log_gates[:, order] + normal(5, ROWS, 1, 1, 2, 2),
        log_momenta=policy.log_momenta[:, order[1:] - 1],
    )
    assert_close(turned.step(X, START, END), policy.step(X, START, END), 1e-14)


def test_point_data_is_reached_in_one_step():
    """All velocities to a point are constant along their paths: noise - x0."""
    x0, noise = normal(1, ROWS, CHANNELS, 2, 2), normal(2, ROWS, CHANNELS, 2, 2)
    source = times(1.0, 0.9, 0.762)
    x = (1 - per_row(source, x0)) * x0 + per_row(source, x0) * noise
    policy = replace(momentum_policy(num_components=1), means=(noise - x0)[:, None], source=source)
    assert_close(policy.step(x, source, torch.zeros_like(source)), x0, 1e-15)


def exponential_policy(rate: float, x_source: Tensor, source: Tensor) -> MomentumPolicy:
    """Of the teacher u = rate x: one component with momentum e^-rate, and the constant one shut out."""
    means = torch.stack([torch.ones_like(x_source), rate * x_source], dim=1)
    log_gates = torch.zeros_like(means[:, :, :1])
    log_gates[:, 0] = -torch.inf
    log_momenta = torch.full_like(log_gates[:, 1:], -rate)
    return MomentumPolicy(means, log_gates, log_momenta, source)


@pytest.mark.parametrize("rate", [0.8, -1.5])
def test_a_linear_teacher_is_matched_exactly(rate):
    source = times(1.0, 0.9, 0.762)
    policy = exponential_policy(rate, X, source)
    assert_close(policy.step(X, source, END), X * torch.exp(-rate * per_row(source - END, X)), 1e-14)

    means, _, momenta = leaves(policy)
    student, teacher = replace(policy, means=means, log_momenta=momenta), rate * policy.step(X, source, MIDDLE)

    def loss(window: float) -> Tensor:
        return ((student.mean_velocity(X, MIDDLE, MIDDLE - window) - teacher) ** 2).mean()

    at_once = loss(0.0)
    assert at_once.item() < 1e-28
    assert max(g.abs().max().item() for g in torch.autograd.grad(at_once, [means, momenta])) < 1e-13
    bias = (loss(0.0174) / (teacher**2).mean()).sqrt().item()
    assert bias == pytest.approx(abs(rate) * 0.0174 / 2, rel=0.02)  # a mean over a window is off by half of it


def initial_log_momenta(num_components: int) -> Tensor:
    """(1, K - 1, 1, 1, 1): ArcFlow's, of the momenta 0.2 to 4."""
    momenta = torch.logspace(math.log10(0.2), math.log10(4), num_components - 1, dtype=torch.float64)
    return momenta.log().reshape(1, -1, 1, 1, 1)


@pytest.mark.parametrize(("std", "second"), [(0.1, 3.5e-3), (0.3, 3e-4), (1.0, 1e-5)])
def test_the_sixteen_initial_momenta_follow_gaussian_data(std, second):
    """Reference 7.2.9: least squares for the velocity along the exact path; how far a policy can go, not how it trains."""
    mean, count = 0.5, 400
    blank = torch.zeros(1, 16, 1, 1, 1, dtype=torch.float64)
    for source, end, error in ((1.0, 0.761904762, 1e-8), (0.761904762, 0.0, second)):
        x_source = gaussian_path(times(1.2), 1.0, times(source), mean, std).reshape(1, 1, 1, 1)
        sigma = source + (end - source) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        x = gaussian_path(x_source, source, sigma.reshape(-1, 1, 1, 1), mean, std)
        velocity = Mixture([[mean]], std).velocity(x, sigma).reshape(-1, 1)
        blanks = MomentumPolicy(blank, blank, initial_log_momenta(16), times(source))
        weights = torch.cat([blanks.weights(now, now).reshape(1, 16) for now in sigma.split(1)])
        fit = torch.linalg.lstsq(weights, velocity, driver="gelsd").solution
        assert (weights @ fit - velocity).square().mean().sqrt() < error
        assert velocity.std() > 50 * error  # of the best that a constant velocity can do
        fitted = replace(blanks, means=fit.reshape(1, 16, 1, 1, 1))
        exact = gaussian_path(x_source, source, times(end), mean, std)
        assert_close(fitted.step(x_source, times(source), times(end)), exact, error)


def test_the_network_output_is_read_in_order():
    """Means (component, then channel), gates, momenta."""
    out = torch.arange(3 * 2 + 3 + 2.0).reshape(1, 11, 1, 1) * torch.tensor([[1.0, 10.0]])
    policy = split_momentum(out.bfloat16(), 3, 2, torch.tensor([1.0]))
    assert policy.means[0, :, :, 0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert policy.log_gates[0, :, 0, 0, 0].tolist() == [6, 7, 8]
    assert policy.log_momenta[0, :, 0, 0, 1].tolist() == [90, 100]
    assert policy.means.dtype == policy.log_gates.dtype == policy.log_momenta.dtype == torch.float32
    assert split_momentum(out[:, :3], 1, 2, torch.tensor([1.0])).log_momenta.shape == (1, 0, 1, 1, 2)
    with pytest.raises(ValueError, match="11 channels"):
        split_momentum(out, 4, 2, torch.tensor([1.0]))


def test_a_mean_velocity_keeps_no_copy_of_the_velocities():
    """Training holds the graphs of several: what each adds has no channels."""
    policy = split_momentum(normal(0, 2, 8 * 16 + 15, 4, 4).float().requires_grad_(), 8, 16, torch.ones(2))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.mean_velocity(torch.zeros(2, 16, 4, 4), torch.full((2,), 0.9), torch.full((2,), 0.5))
    kept.pop(policy.means.untyped_storage().data_ptr(), None)
    assert max(kept.values()) <= 4 * policy.log_gates.numel()


# -- pi-Flow's policy ------------------------------------------------------------------------------------------------


def informed_policy(data: Mixture, x_source: Tensor, source: Tensor) -> GMFlowPolicy:
    """What a perfect network would say of ``data``."""
    means, log_gates, variance = data.posterior(x_source, source)
    return GMFlowPolicy(means, log_gates, 0.5 * variance.flatten().log(), x_source, source, SHIFT)


@pytest.mark.parametrize("sigma", [0.85, 0.5, 0.1, 0.01])
def test_a_perfect_mixture_has_the_velocity_of_the_data_everywhere(sigma):
    x_source, source = normal(0, 6, 2, 1, 1), times(1, 0.99, 0.97, 0.95, 0.9, 0.85)
    policy = informed_policy(CORNERS, x_source, source)
    x, now = normal(1, 6, 2, 1, 1), torch.full((6,), sigma, dtype=torch.float64)
    assert_close(policy.velocity(x, now), CORNERS.velocity(x, now), 1e-10)


def test_a_perfect_mixture_follows_the_data():
    x, one = times(1.2).reshape(1, 1, 1, 1), times(1.0)
    policy = informed_policy(GAUSSIAN, x, one)
    for raw_end, count in ((0.5, 64), (0.0, 128)):
        sigmas = shift_time(torch.linspace(1, raw_end, count + 1, dtype=torch.float64), SHIFT)
        reached = policy.step(x, one, sigmas[-1:])
        assert_close(reached, euler(GAUSSIAN.velocity, x, sigmas), 1e-13)
        exact = gaussian_path(x, 1.0, sigmas[-1], 0.5, 0.3)
        assert_close(reached, exact, 0.02)  # as near as Euler comes with so many substeps


def test_at_its_source_a_mixture_gives_the_mean_of_its_velocities():
    velocities, log_gates = normal(0, ROWS, 4, CHANNELS, 2, 2), normal(1, ROWS, 4, 1, 2, 2)
    out = torch.cat([velocities.flatten(1, 2), log_gates.flatten(1, 2)], dim=1)
    source, log_std = times(1.0, 0.9, 0.762), times(-1.0, 0.0, 0.3)
    policy = split_gmflow(out, log_std, 4, CHANNELS, X, source, SHIFT)
    assert_close(policy.velocity(X, source), (log_gates.softmax(dim=1) * velocities).sum(dim=1), 1e-13)
    assert_close(policy.log_std.exp(), log_std.exp() * source, 1e-15)


def test_substeps_are_of_a_128th_and_each_row_has_its_own():
    a, b = shift_time(times(1.0, 0.5, 0.5, 0.3), SHIFT), shift_time(times(0.5, 0.5 - 3 / 128, 0.5, 0.0), SHIFT)
    sigmas, shares = substeps(a, b, SHIFT)
    raw = unshift_time(sigmas, SHIFT)
    assert sigmas.shape == (4, 65)
    assert torch.equal(sigmas[:, 0], a)
    assert torch.equal(sigmas[:, -1], b)
    assert_close(-raw[0].diff(), torch.full((64,), 1 / 128, dtype=torch.float64), 1e-12)
    assert_close(-raw[1].diff()[:4], times(1, 1, 1, 0) / 128, 1e-12)
    assert_close(-raw[3].diff()[37:39], times(0.3 / 38, 0), 1e-12)  # 38.4 substeps: 38 that fill the way
    assert_close(shares.sum(dim=1), torch.ones(4, dtype=torch.float64), 1e-12)
    assert shares[2].tolist() == [1] + [0] * 63


def test_rows_of_a_mixture_take_the_steps_that_they_would_take_alone():
    policy = gmflow_policy()
    a, b = policy.source, shift_time(unshift_time(policy.source, SHIFT) - times(0.2, 3 / 128, 0.0), SHIFT)
    together = policy.mean_velocity(X, a, b)
    for i, count in enumerate((26, 3, 1)):
        row = slice(i, i + 1)
        alone = GMFlowPolicy(
            *(f[row] for f in (policy.means, policy.log_gates, policy.log_std, policy.x_source, policy.source)), SHIFT
        )
        raw_a, raw_b = unshift_time(a[i], SHIFT), unshift_time(b[i], SHIFT)
        sigmas = shift_time(raw_a + (raw_b - raw_a) * torch.arange(count + 1) / count, SHIFT)
        if i == 2:
            expected = alone.velocity(X[row], a[row])
        else:
            expected = (X[row] - euler(alone.velocity, X[row], sigmas)) / (a[i] - b[i])
        assert_close(together[row], expected, 1e-12)


def test_a_mixture_near_the_data_needs_no_floor_under_sigma():
    x_source, x, source = normal(0, 4, 2, 1, 1), normal(1, 4, 2, 1, 1), torch.full((4,), 0.9, dtype=torch.float64)
    policy = informed_policy(CORNERS, x_source, source)
    fields = (policy.means, policy.log_gates, policy.log_std, x_source, source)
    single = GMFlowPolicy(*(f.float() for f in fields), SHIFT)
    for sigma in (1e-2, 1e-4, 1e-6, 0.0):
        now = torch.full((4,), sigma, dtype=torch.float64)
        assert_close(single.velocity(x.float(), now.float()).double(), policy.velocity(x, now), 2e-4)
    assert_close(policy.velocity(x, torch.zeros_like(source)), -x, 1e-13)  # E[noise | x] is 0 at x0 = x


def test_point_data_is_reached_by_a_mixture_of_one_point():
    """The variance is 0, and rows that arrive before others have no velocity where they are."""
    policy = gmflow_policy(num_components=1, dtype=torch.float32)
    policy = replace(policy, log_std=torch.full((ROWS,), -60.0))
    reached = policy.step(policy.x_source, policy.source, torch.zeros(ROWS))
    assert_close(reached, policy.means[:, 0], 1e-5)


def test_temperature_sharpens_gates_and_narrows_components():
    policy, temperature = gmflow_policy(), 0.3
    cooled = policy.with_temperature(temperature)
    gates = policy.log_gates.softmax(dim=1) ** (1 / temperature)
    assert_close(cooled.log_gates.softmax(dim=1), gates / gates.sum(dim=1, keepdim=True), 1e-13)
    assert_close((2 * cooled.log_std).exp(), temperature * (2 * policy.log_std).exp(), 1e-14)
    assert_close(policy.with_temperature(1.0).velocity(X, END + 0.1), policy.velocity(X, END + 0.1), 0)


# -- what both share -------------------------------------------------------------------------------------------------


@BOTH
def test_gradcheck_of_the_mean_velocity(make):
    policy = make(num_components=3)
    names = ["means", "log_gates", "log_momenta" if isinstance(policy, MomentumPolicy) else "log_std"]
    inputs = [getattr(policy, name).clone() for name in names]
    if isinstance(policy, MomentumPolicy):
        inputs[2][0] = 0  # through phi(0)
    start = shift_time(times(0.9, 0.7, 0.5), SHIFT)
    end = shift_time(times(0.9 - 3 / 128, 0.7, 0.5 - 1 / 128), SHIFT)  # the second has no way to go

    def mean(x: Tensor, *values: Tensor) -> Tensor:
        return replace(policy, **dict(zip(names, values))).mean_velocity(x, start, end) + 0 * x

    assert gradcheck(mean, [value.requires_grad_() for value in (X.clone(), *inputs)], fast_mode=True)


@BOTH
def test_a_step_is_the_way_at_the_mean_velocity(make):
    policy = make()
    way = (START - MIDDLE).reshape(-1, 1, 1, 1) * policy.mean_velocity(X, START, MIDDLE)
    assert_close(policy.step(X, START, MIDDLE), X - way, 0)
    assert_close(policy.mean_velocity(X, MIDDLE, MIDDLE), policy.velocity(X, MIDDLE), 0)


@BOTH
def test_dropped_components_do_not_matter_and_the_rest_share_their_gates(make):
    policy = make()
    mask = torch.tensor([[False, True, False, True], [False] * 4, [True] * 4])
    kept = policy.with_dropped(mask)
    assert_close(kept.log_gates.softmax(dim=1).sum(dim=1), torch.ones(ROWS, 1, 2, 2, dtype=torch.float64), 1e-15)
    elsewhere = policy.means.clone()
    elsewhere[0, [1, 3]] += 1
    moved = replace(kept, means=elsewhere)
    assert_close(moved.step(X, START, END), kept.step(X, START, END), 0)
    whole = policy.step(X, START, END)
    assert (kept.step(X, START, END)[0] - whole[0]).abs().max() > 0.01
    assert_close(kept.step(X, START, END)[1:], whole[1:], 0)  # none dropped, and all: then none
    ratio = policy.log_gates[0, 0] - policy.log_gates[0, 2]
    assert_close(kept.log_gates[0, 0] - kept.log_gates[0, 2], ratio, 0)


@BOTH
def test_gradients_with_dropped_components_are_finite(make):
    policy = make()
    log_gates = policy.log_gates.clone().requires_grad_()
    mask = torch.tensor([[False, True, True, True], [False] * 4, [True] * 4])
    replace(policy, log_gates=log_gates).with_dropped(mask).step(X, START, END).sum().backward()
    assert torch.isfinite(log_gates.grad).all()
    assert (log_gates.grad[0, 1:] == 0).all()
    assert (log_gates.grad[1] != 0).all()


@BOTH
def test_a_detached_policy_is_the_same_without_a_graph(make):
    policy = make()
    tensors = {name: value for name, value in vars(policy).items() if isinstance(value, Tensor)}
    live = replace(policy, **{name: value.clone().requires_grad_() for name, value in tensors.items()})
    assert live.step(X, START, END).requires_grad
    assert not live.detach().step(X, START, END).requires_grad
    assert torch.equal(live.detach().step(X, START, END), policy.step(X, START, END))


@BOTH
def test_half_precision_is_computed_in_fp32(make):
    policy = make(dtype=torch.bfloat16)
    tensors = {name: value.float() for name, value in vars(policy).items() if isinstance(value, Tensor)}
    single: Policy = replace(policy, **tensors)
    x, a, b = X.bfloat16(), START.float(), END.float()
    assert policy.step(x, a, b).dtype == policy.velocity(x, a).dtype == torch.float32
    assert torch.equal(policy.step(x, a, b), single.step(x.float(), a, b))
    assert torch.equal(policy.velocity(x, a), single.velocity(x.float(), a))


# -- imitation of a teacher ------------------------------------------------------------------------------------------


def error_after_imitation(num_components: int) -> float:
    """A policy's own tensors for 64 noises, taught as ArcFlow is (on its own way), from noise to data in one segment.

    The median over rows of its distance from the teacher's fine path: rows between two modes are anybody's.
    """
    rows, rate, num_updates = 64, 0.1, 320
    noise, source = normal(0, rows, 2, 1, 1), torch.ones(rows)
    means, log_gates = (torch.zeros(rows, num_components, channels, 1, 1) for channels in (2, 1))
    fields = (means, log_gates, initial_log_momenta(num_components).float().repeat(rows, 1, 1, 1, 1))
    policy = MomentumPolicy(*(field.requires_grad_() for field in fields), source)
    optimizer = torch.optim.Adam(fields, betas=(0.9, 0.95))
    window = match_window(1.0)
    for update in range(num_updates):
        gaps, _ = query_intervals(uniform(update, rows, 1), torch.zeros(rows, 0), 1 - window, mixing=0.0)
        raw = 1 - gaps[:, 0]
        a, b = shift_time(raw, SHIFT), shift_time((raw - window).clamp(min=0), SHIFT)
        with torch.no_grad():
            target = CORNERS.velocity(policy.step(noise, source, a), a)
        loss = ((policy.mean_velocity(noise, a, b) - target) ** 2).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * update / num_updates))
        optimizer.step()
    teachers = euler(CORNERS.velocity, noise, shift_time(torch.linspace(1, 0, 301, dtype=torch.float64), SHIFT))
    with torch.no_grad():
        reached = policy.step(noise, source, torch.zeros(rows))
    return float((reached - teachers).square().mean(dim=(1, 2, 3)).sqrt().median())


def test_more_components_imitate_a_teacher_better():
    """Reference 7.2.10 in small, without a network: 1 component is a straight line, 2 bend it, 16 follow it."""
    one, two, sixteen = (error_after_imitation(count) for count in (1, 2, 16))
    assert two < 0.6 * one
    assert sixteen < 0.6 * two
