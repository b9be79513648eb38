"""Samplers against the stock SDXL pipeline step by step, and backward simulation against a plain loop."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from train_t2i.families import Family, load_family
from train_t2i.networks import Networks
from train_t2i.sampling import few_step, many_step, simulate_to
from train_t2i.schedule import EpsilonVP

PROMPTS = ["a red circle", "two blue squares, one of them small"]
SIZE = {"height": 24, "width": 40}
PATH = EpsilonVP(tiny.ALPHAS_CUMPROD)


@pytest.fixture(scope="module")
def family(sdxl_folder) -> Family:
    return load_family("auto", str(sdxl_folder))


@pytest.fixture(scope="module")
def networks(family) -> Networks:
    return tiny.networks(family, "shared")


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn((2, 4, 3, 5), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pipe(sdxl_folder) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, scheduler, noise: Tensor, **options) -> list[Tensor]:
    """The latents after each step of the published pipeline."""
    seen: list[Tensor] = []

    def keep(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    pipe.scheduler = scheduler
    options |= {"latents": noise.clone(), "output_type": "latent", "callback_on_step_end": keep, **SIZE}
    pipe(PROMPTS, **options)
    return seen


def ours_recorded(networks: Networks, cond, role: str, cfg: float):
    """(x0_at, the inputs that it was asked at)."""
    inputs: list[Tensor] = []

    def x0_at(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x)
        return networks.x0(role, x, t, cond, cfg=cfg)

    return x0_at, inputs


@pytest.mark.parametrize(("cfg", "negative"), [(4.5, ""), (4.5, "a blurred picture"), (1.0, None)])
def test_the_teacher_is_the_stock_pipeline_step_by_step(pipe, networks, family, noise, cfg, negative):
    theirs = stock(
        pipe, DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        ),
        noise, num_inference_steps=5, guidance_scale=cfg,
        negative_prompt=[negative] * 2 if negative else None,
    )  # fmt: skip
    x0_at, inputs = ours_recorded(networks, family.encode(PROMPTS, negative), "teacher", cfg)
    last = many_step(x0_at, family.path, 5, noise)
    assert len(inputs) == 5
    for step, (mine, their) in enumerate(zip([*inputs[1:], last], theirs, strict=True)):
        torch.testing.assert_close(mine, their, rtol=1e-3, atol=1e-3, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_student_is_the_stock_lcm_pipeline(pipe, networks, family, noise, num_steps):
    scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=num_steps)
    theirs = stock(
        pipe, scheduler, noise,
        num_inference_steps=num_steps, guidance_scale=1.0, generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    rng = torch.Generator().manual_seed(9)
    x0_at, inputs = ours_recorded(networks, family.encode(PROMPTS, None), "generator", 1.0)
    grid = family.path.grid(num_steps)
    last = few_step(x0_at, family.path, grid, noise, lambda i: torch.randn(noise.shape, generator=rng))
    assert len(inputs) == num_steps
    for mine, their in zip([*inputs[1:], last], theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-3, atol=1e-3)


def test_the_one_step_student_is_the_stock_pipeline_at_level_399(pipe, networks, family, noise):
    config = dict(pipe.scheduler.config)
    betas = LCMScheduler.from_config(config).betas[:400].tolist()
    scheduler = LCMScheduler(num_train_timesteps=400, trained_betas=betas, original_inference_steps=1)
    (theirs,) = stock(pipe, scheduler, noise, num_inference_steps=1, guidance_scale=1.0)
    x0_at, _ = ours_recorded(networks, family.encode(PROMPTS, None), "generator", 1.0)
    mine = few_step(x0_at, family.path, family.path.grid(1), noise, lambda i: pytest.fail("no fresh noise is needed"))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


# -- backward simulation ---------------------------------------------------------------------------------------------

SHAPE = (5, 4, 2, 3)


def student(x: Tensor, t: Tensor) -> Tensor:
    """Something that depends on input and time, row by row."""
    return torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1))


def fresh(i: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i))


def estimates(grid: Tensor) -> list[Tensor]:
    """The student's estimates at each of its times, run to the end as at inference."""
    x, found = fresh(0), []
    for i in range(len(grid) - 1):
        t = grid[i].expand(5)
        found.append(student(x, t))
        if i < len(grid) - 2:
            x = PATH.add_noise(found[-1], fresh(i + 1), grid[i + 1].expand(5))
    return found


@pytest.mark.parametrize("level", [[0, 3, 1, 2, 3], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [2, 2, 2, 2, 2]])
def test_each_row_keeps_its_own_estimate_and_the_run_stops_at_the_largest(level):
    grid, calls, asked, renoised = PATH.grid(4), [], [], []

    def x0_of(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        calls.append(float(t[0]))
        asked.append(sorted(rows.tolist()))
        return student(x, t)

    def renoise(i: int) -> Tensor:
        renoised.append(i)
        return fresh(i)

    kept = simulate_to(x0_of, PATH, grid, fresh(0), renoise, torch.tensor(level))
    at = estimates(grid)
    for row, index in enumerate(level):
        assert torch.equal(kept[row], at[index][row])
    assert calls == grid[: max(level) + 1].tolist()
    assert asked == [[row for row, own in enumerate(level) if own >= i] for i in range(max(level) + 1)]
    assert renoised == list(range(1, max(level) + 1))


def test_where_calls_need_all_processes_every_one_is_made_whatever_was_drawn():
    grid, asked = PATH.grid(4), []

    def x0_of(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return student(x, t)

    kept = simulate_to(x0_of, PATH, grid, fresh(0), fresh, torch.tensor([0, 1, 0, 1, 0]), whole=True)
    at = estimates(grid)
    assert all(torch.equal(kept[row], at[index][row]) for row, index in enumerate([0, 1, 0, 1, 0]))
    assert asked == [5, 2, 1, 1]


def test_few_step_is_the_last_estimate():
    for num_steps in (1, 2, 4):
        grid = PATH.grid(num_steps)
        assert torch.equal(few_step(student, PATH, grid, fresh(0), fresh), estimates(grid)[-1])


def test_few_step_carries_the_gradient_of_every_call():
    """Regression on the whole sample trains all of its steps."""
    grid = PATH.grid(3)
    weights = [torch.ones((), requires_grad=True) for _ in range(3)]
    used = iter(weights)
    few_step(lambda x, t: next(used) * student(x, t), PATH, grid, fresh(0), fresh).square().mean().backward()
    assert all(weight.grad is not None and weight.grad != 0 for weight in weights)


def test_many_step_ends_clean():
    """With a perfect estimate at hand the deterministic path ends on it exactly."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(many_step(lambda x, t: x0, PATH, 7, fresh(0)), x0)


def test_many_step_asks_at_the_dense_times():
    """Where the number of steps does not divide 1000 the dense grid is not the student's.  (diffusers' DDIM then lands a
    level beside the next time that it asks at; ours lands on it.)"""
    asked: list[float] = []

    def x0_at(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return x

    many_step(x0_at, PATH, 3, fresh(0))
    assert asked == PATH.dense_grid(3)[:-1].tolist()
    assert asked != PATH.grid(3)[:-1].tolist()
