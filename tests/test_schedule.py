"""Forward processes and grids against diffusers' schedulers; time distributions against closed forms; counted randomness."""

from __future__ import annotations

import math
import random
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers.utils.torch_utils import randn_tensor
from tiny import ALPHAS_CUMPROD, NOISE

from train_t2i.randomness import Draw, seeded_noise
from train_t2i.schedule import EpsilonVP, TimeSampler, cosine_fall, shift_time

PATH = EpsilonVP(ALPHAS_CUMPROD)
CPU = torch.device("cpu")


def draw(indices=range(6), tick: int = 3, seed: int = 1) -> Draw:
    return Draw(seed, tick, indices, CPU)


def normal(stream: str, count: int = 6) -> torch.Tensor:
    return draw(range(count)).normal(stream, (4, 5, 3))


# -- the forward process ---------------------------------------------------------------------------------------------


def test_add_noise_is_ddpm_at_every_level():
    x0, noise = normal("x0", 1000), normal("noise", 1000)
    levels = torch.arange(1000)
    theirs = DDPMScheduler(**NOISE).add_noise(x0, noise, levels)
    torch.testing.assert_close(PATH.add_noise(x0, noise, levels / 1000), theirs, rtol=0, atol=1e-6)


def test_to_x0_undoes_add_noise():
    t = torch.tensor([0.0, 0.02, 0.399, 0.6, 0.98, 1.0])
    x0, noise = normal("x0"), normal("noise")
    x_t = PATH.add_noise(x0, noise, t)
    assert torch.equal(PATH.target(x0, noise, t), noise)
    # at level 999 the estimate divides by alpha = 0.068: rounding grows by 1 / 0.068
    torch.testing.assert_close(PATH.to_x0(x_t, PATH.target(x0, noise, t), t), x0, rtol=0, atol=2e-5)


def test_half_precision_inputs_are_computed_in_fp32():
    """A half-precision schedule is off by 7 % at small times."""
    t = torch.tensor([0.0, 0.001, 0.005, 0.1, 0.5, 0.999])
    x0, noise = normal("x0").bfloat16(), normal("noise").bfloat16()
    x_t = PATH.add_noise(x0, noise, t)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, PATH.add_noise(x0.float(), noise.float(), t), rtol=0, atol=0)
    assert PATH.to_x0(x_t.bfloat16(), noise, t).dtype == torch.float32


@pytest.mark.parametrize(
    ("t", "level"), [(0.0, 0), (0.0004, 0), (0.0006, 1), (0.399, 399), (0.9996, 999), (1.0, 999), (0.9984, 998)]
)
def test_levels_round_and_stay_inside(t, level):
    assert PATH.levels(torch.tensor([t])).tolist() == [level]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 25])
def test_the_deterministic_path_is_ddim_with_trailing_times(num_steps):
    theirs = DDIMScheduler(**NOISE, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    theirs.set_timesteps(num_steps)
    grid = PATH.dense_grid(num_steps)
    assert PATH.levels(grid[:-1]).tolist() == theirs.timesteps.tolist()
    ours = x = normal("start")
    for i, level in enumerate(theirs.timesteps):
        eps = normal(f"eps/{i}")
        x = theirs.step(eps, int(level), x).prev_sample
        t, s = grid[i].expand(6), grid[i + 1].expand(6)
        ours = PATH.step(ours, PATH.to_x0(ours, eps, t), t, s)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_dense_grids_are_diffusers_trailing_times():
    theirs = DDIMScheduler(**NOISE, timestep_spacing="trailing")
    for num_steps in (1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 15, 16, 20, 28, 30, 40, 50, 100, 250, 500):
        theirs.set_timesteps(num_steps)
        grid = PATH.dense_grid(num_steps)
        assert PATH.levels(grid[:-1]).tolist() == theirs.timesteps.tolist(), num_steps
        assert grid.dtype == torch.float32
        assert grid[-1] == 0


def test_a_step_to_zero_gives_the_clean_estimate_row_by_row():
    x_t, x0, noise = normal("x_t"), normal("x0"), normal("noise")
    t, s = torch.full((6,), 0.7), torch.tensor([0.0, 0.3, 0.0, 0.3, 0.3, 0.0])
    for fresh in (None, noise):
        stepped = PATH.step(x_t, x0, t, s, fresh)
        assert torch.equal(stepped[s == 0], x0[s == 0])
        assert not torch.isclose(stepped[s > 0], x0[s > 0]).all(dim=(1, 2, 3)).any()
    torch.testing.assert_close(PATH.step(x_t, x0, t, s, noise)[1], PATH.add_noise(x0, noise, s)[1])


# -- the student's grids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 3, 4, 8])
def test_grids_are_the_times_of_an_exported_lcm_scheduler(num_steps):
    theirs = LCMScheduler(**NOISE, original_inference_steps=num_steps)
    theirs.set_timesteps(num_steps)
    grid = PATH.grid(num_steps)
    assert PATH.levels(grid[:-1]).tolist() == theirs.timesteps.tolist()
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_four_steps():
    assert PATH.levels(PATH.grid(4)[:-1]).tolist() == [999, 749, 499, 249]


def test_one_step_is_level_399_of_a_shortened_scheduler():
    grid = PATH.grid(1)
    assert PATH.levels(grid[:-1]).tolist() == [399]
    betas = DDPMScheduler(**NOISE).betas[:400]
    theirs = LCMScheduler(num_train_timesteps=400, trained_betas=betas, original_inference_steps=1)
    theirs.set_timesteps(1)
    assert theirs.timesteps.tolist() == [399]
    noise, eps = normal("noise"), normal("eps")
    t = grid[:1].expand(6)
    ours = PATH.step(noise, PATH.to_x0(noise, eps, t), t, torch.zeros(6))
    # its boundary condition mixes in 1.6e-8 of the input
    torch.testing.assert_close(ours, theirs.step(eps, 399, noise).prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_a_grid_of_no_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match="grid"):
        PATH.grid(num_steps)


def test_shift():
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(shift_time(u, 3.0), torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0]))  # SD3 at shift 3
    torch.testing.assert_close(shift_time(u, 5.0), torch.tensor([0.0, 0.625, 0.8333333, 0.9375, 1.0]))
    assert torch.equal(shift_time(u, 1.0), u)
    shifted = EpsilonVP(PATH.alphas_cumprod, shift=3.0)
    assert shifted.levels(shifted.grid(4)[:-1]).tolist() == [999, 899, 749, 499]  # and not the formula on 0..999


# -- distributions of times ------------------------------------------------------------------------------------------


def test_cosine_fall():
    assert [cosine_fall(step, 100) for step in (0, 50, 100, 101)] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    assert cosine_fall(25, 100) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert cosine_fall(0, 0) == 0.0
    assert cosine_fall(99, 100) > 0


def test_the_beta_runs_from_its_parameters_to_uniform():
    sampler = TimeSampler("beta", 4.0, 1.5, dynamic_steps=100)
    assert sampler.beta_at(0) == (4.0, 1.5)
    assert sampler.beta_at(50) == (pytest.approx(2.5), pytest.approx(1.25))
    assert sampler.beta_at(100) == (1.0, 1.0)
    assert sampler.beta_at(10_000) == (1.0, 1.0)
    assert TimeSampler("beta", 4.0, 1.5, dynamic_steps=0).beta_at(10_000) == (4.0, 1.5)


ROWS = range(6000)


def moments(values: torch.Tensor) -> tuple[float, float]:
    return float(values.double().mean()), float(values.double().std())


@pytest.mark.parametrize(
    ("sampler", "step", "mean", "std"),
    [
        (TimeSampler("uniform", low=0.0, high=1.0), 0, 0.5, math.sqrt(1 / 12)),
        (TimeSampler("uniform"), 0, 0.5, 0.96 * math.sqrt(1 / 12)),
        (TimeSampler("beta", 4.0, 1.5, low=0.0, high=1.0), 0, 4 / 5.5, math.sqrt(6 / (5.5**2 * 6.5))),
        (TimeSampler("beta", 4.0, 1.5), 0, 0.02 + 0.96 * 4 / 5.5, 0.96 * math.sqrt(6 / (5.5**2 * 6.5))),
        (TimeSampler("beta", 4.0, 1.5, 10, low=0.0, high=1.0), 10, 0.5, math.sqrt(1 / 12)),
    ],
)
def test_moments_of_the_times(sampler, step, mean, std):
    times = sampler.sample(draw(ROWS), "time", step)
    assert times.dtype == torch.float32
    assert moments(times) == (pytest.approx(mean, abs=0.015), pytest.approx(std, abs=0.012))
    assert times.min() >= sampler.low
    assert times.max() <= sampler.high


def test_logit_normal_is_logit_normal():
    """The published flag of that name drew a Beta."""
    times = TimeSampler("logit_normal", 0.4, 0.7, low=0.0, high=1.0).sample(draw(ROWS), "time", 0).double()
    logits = torch.logit(times)
    assert moments(logits) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.7, abs=0.02))
    z = ((logits - 0.4) / 0.7).sort().values
    gap = (torch.special.ndtr(z) - (torch.arange(len(z)) + 0.5) / len(z)).abs().max()
    assert gap < 1.63 / math.sqrt(len(z))  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("kind", ["beta", "logit_normal"])
def test_the_level_is_the_nearest_to_the_draw(kind):
    """The published code always took the smallest time."""
    sampler, grid = TimeSampler(kind, 2.0, 1.5), PATH.grid(4)
    index = sampler.sample_index(draw(range(400)), "level", 0, grid)
    times = sampler.sample(draw(range(400)), "level", 0)
    nearest = [min(range(4), key=lambda i: abs(float(grid[i]) - float(t))) for t in times]
    assert index.tolist() == nearest
    assert set(nearest) == {0, 1, 2, 3}


def test_the_level_follows_the_distribution_over_training():
    sampler, grid = TimeSampler("beta", 8.0, 1.0, dynamic_steps=10), PATH.grid(4)
    share = [
        float((sampler.sample_index(draw(range(800)), "level", step, grid) <= 1).float().mean()) for step in (0, 10)
    ]
    assert share[0] > 0.9  # noisy levels at the start
    assert share[1] == pytest.approx(1 - 0.624, abs=0.06)  # uniform later: all above the middle of 0.749 and 0.499


def test_a_uniform_level_is_uniform():
    index = TimeSampler("uniform").sample_index(draw(ROWS), "level", 0, PATH.grid(4))
    assert index.dtype == torch.int64
    assert torch.bincount(index, minlength=4).tolist() == [pytest.approx(1500, abs=130)] * 4


# -- randomness as a function of a counter ---------------------------------------------------------------------------

KINDS = {
    "normal": lambda d: d.normal("s", (2, 3)),
    "uniform": lambda d: d.uniform("s"),
    "beta": lambda d: d.beta("s", 4.0, 1.5),
    "logit_normal": lambda d: d.logit_normal("s", 0.0, 1.0),
    "integers": lambda d: d.integers("s", 1 << 30),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_company(kind):
    of = KINDS[kind]
    together = of(draw([7, 3, 12, 4]))
    assert torch.equal(together, of(draw([7, 3, 12, 4])))
    for position, index in enumerate([7, 3, 12, 4]):
        assert torch.equal(together[position], of(draw([index]))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_ticks_seeds_and_streams_differ(kind):
    of = KINDS[kind]
    found = [of(draw([0])), of(draw([1])), of(draw([0], tick=4)), of(draw([0], seed=2)), of(draw([2**40]))]
    assert len({tuple(value.flatten().tolist()) for value in found}) == len(found)


def test_streams_are_independent():
    a, b = normal("a", 200).flatten(), normal("b", 200).flatten()
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05
    assert moments(a) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.03))


def test_the_streams_in_use_have_keys_of_their_own():
    """A stream is keyed by the CRC of its name."""
    sources = [p.read_text() for p in (Path(__file__).parents[1] / "train_t2i").rglob("*.py")]
    pattern = r"""\b(?:draw|score_times|level_times|times)\.\w+\(\s*(?:(?:rollout\.)?draw(?:\.on_host\(\))?,\s*)?f?"([\w/{}]+)\""""
    names = {name for source in sources for name in re.findall(pattern, source)}
    assert {"score_noise", "guidance_noise", "student_input", "level"} <= names
    names |= {name.replace("{i}", str(i)) for name in names for i in range(1, 9)}
    assert len({zlib.crc32(name.encode()) for name in names}) == len(names)


def test_no_global_generator_is_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for of in KINDS.values():
        of(draw())
    seeded_noise([1, 2], (4, 2, 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_noise_of_a_seed_is_what_pipelines_draw():
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (11, 12)]
    theirs = randn_tensor((2, 4, 8, 6), generator=generators, device=CPU, dtype=torch.float32)
    assert torch.equal(seeded_noise([11, 12], (4, 8, 6)), theirs)
