"""Rectified flow against diffusers' scheduler and against lines that can be followed by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from train_t2i.sampling import few_step, many_step
from train_t2i.schedule import RectifiedFlow, even_times, per_row

PATH = RectifiedFlow()


def normal(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, 5, 3, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([0.02, 0.25, 0.399, 0.75, 0.98, 1.0])


def test_add_noise_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    x0, noise = normal(0), normal(1)
    t = scheduler.sigmas[[0, 100, 300, 500, 700, 999]]
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[[0, 100, 300, 500, 700, 999]], noise)
    torch.testing.assert_close(PATH.add_noise(x0, noise, t), theirs, rtol=0, atol=1e-6)


def test_a_perfect_network_leads_back() -> None:
    x0, noise = normal(0), normal(1)
    x_t, velocity = PATH.add_noise(x0, noise, TIMES), PATH.target(x0, noise, TIMES)
    torch.testing.assert_close(PATH.to_x0(x_t, velocity, TIMES), x0, rtol=0, atol=1e-6)
    assert torch.equal(PATH.add_noise(x0, noise, TIMES)[-1], noise[-1])  # pure noise at the top


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_step_is_the_schedulers(stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.schedulers.scheduling_flow_match_euler_discrete as euler

    fresh = normal(2)
    monkeypatch.setattr(euler, "randn_tensor", lambda shape, **options: fresh)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=even_times(4)[:-1].tolist())
    x, out = normal(0), normal(1)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(out, t, x, return_dict=False)[0]
        now, then = (scheduler.sigmas[j].expand(len(x)) for j in (i, i + 1))
        ours = PATH.step(x, PATH.to_x0(x, out, now), now, then, fresh if stochastic else None)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shift", "expected"), [
    (3.0, [1.0, 0.9, 0.75, 0.5, 0.0]), (5.0, [1.0, 0.9375, 0.833333, 0.625, 0.0]), (1.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
])  # fmt: skip
def test_the_published_grids(shift: float, expected: list[float]) -> None:
    """Those of DMDR's SD3-medium and SD3.5-large, as a scheduler of that shift gives them for 1, .75, .5, .25."""
    grid = RectifiedFlow(shift).grid(4)
    torch.testing.assert_close(grid, torch.tensor(expected), rtol=0, atol=1e-6)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(grid, scheduler.sigmas, rtol=0, atol=1e-6)


def test_times_and_steps_stay_fp32_in_half_precision() -> None:
    """bfloat16 keeps eight bits: it would turn 0.9001 into 0.8984."""
    t = torch.tensor([0.9001, 0.7504, 0.5010, 0.3, 0.2, 0.1])
    x0, noise = normal(0).bfloat16(), normal(1).bfloat16()
    expected = (1 - per_row(t, x0)) * x0.float() + per_row(t, x0) * noise.float()
    found = PATH.add_noise(x0, noise, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_teacher_asks_at_its_schedulers_times() -> None:
    times = torch.tensor([1.0, 0.7, 0.2, 0.0])
    asked: list[float] = []

    def x0_at(x: Tensor, t: Tensor) -> Tensor:
        asked.append(round(float(t[0]), 6))
        return torch.zeros_like(x)

    many_step(x0_at, RectifiedFlow(dense=lambda n: times), 3, normal(0))
    assert asked == [1.0, 0.7, 0.2]


def test_an_ode_student_draws_no_noise_and_an_sde_student_does() -> None:
    """With a network that knows x0 both end there; between, the deterministic one stays on its line."""
    x0, noise = normal(0), normal(1)
    grid = RectifiedFlow(3.0).grid(4)
    seen: list[Tensor] = []

    def x0_at(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x0

    assert torch.equal(few_step(x0_at, PATH, grid, noise, None), x0)
    for x, t in zip(seen, grid):
        torch.testing.assert_close(x, PATH.add_noise(x0, noise, t.expand(6)), rtol=0, atol=2e-6)
    seen.clear()
    drawn: list[int] = []

    def renoise(i: int) -> Tensor:
        drawn.append(i)
        return normal(10 + i)

    assert torch.equal(few_step(x0_at, PATH, grid, noise, renoise), x0)
    assert drawn == [1, 2, 3]
    torch.testing.assert_close(seen[2], PATH.add_noise(x0, normal(12), grid[2].expand(6)), rtol=0, atol=1e-6)
