"""The times of supervised training and their weights, against diffusers' own training helpers and schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from flow_models import save_flow

from train_t2i import losses
from train_t2i.config import SFTConfig
from train_t2i.families import load_family
from train_t2i.methods.sft import noise_rank, time_weight
from train_t2i.randomness import Draw

CPU, MANY = torch.device("cpu"), 20_000


def ranks(first: int = 0, count: int = MANY, tick: int = 0, **settings: Any) -> torch.Tensor:
    return noise_rank(SFTConfig(**settings), Draw(0, tick, range(first, first + count), CPU))


@pytest.mark.parametrize("settings", [
    {}, {"weighting_scheme": "sigma_sqrt"}, {"weighting_scheme": "logit_normal", "logit_mean": 0.6, "logit_std": 0.7},
    {"weighting_scheme": "mode"}, {"weighting_scheme": "mode", "mode_scale": 0.5}, {"uniform_sampling": True},
])  # fmt: skip
def test_levels_are_drawn_as_diffusers_draws_them(settings: dict[str, Any]) -> None:
    """Two samples of 20,000 have quantiles within 0.012 of each other (Kolmogorov-Smirnov at 1 % allows 0.016)."""
    scheme = {"weighting_scheme": "none", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | settings
    scheme.pop("uniform_sampling", None)
    u = compute_density_for_timestep_sampling(batch_size=MANY, **scheme, generator=torch.Generator().manual_seed(1))
    points = torch.linspace(0, 1, 101)
    expected = torch.bucketize(points, (1 - u).sort().values) / MANY
    found = torch.bucketize(points, ranks(**settings).sort().values) / MANY
    assert (expected - found).abs().max() < 0.012


def test_levels_reach_both_ends() -> None:
    """A teacher must work at level 999 and at level 0 too."""
    assert float(ranks().min()) < 0.005
    assert float(ranks().max()) > 0.995


def test_uniform_sampling_spreads_every_part_of_a_batch() -> None:
    """Any 8 rows in a row lie closer to even than 7/8 of a step; draws of their own leave gaps more than twice as wide."""

    def widest_gap(rank: torch.Tensor) -> float:
        placed = rank.sort().values
        return float(torch.cat([placed.diff(), placed[:1] + 1 - placed[-1:]]).max())

    spread = [widest_gap(ranks(first, 8, tick, uniform_sampling=True)) for tick in range(4) for first in (0, 8, 1000)]
    alone = [widest_gap(ranks(first, 8, tick)) for tick in range(4) for first in (0, 8, 1000)]
    assert max(spread) < 0.25 < float(np.mean(alone))
    assert not torch.equal(ranks(0, 8, 0, uniform_sampling=True), ranks(0, 8, 1, uniform_sampling=True))


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(scheme: str) -> None:
    t = torch.linspace(0.02, 1, 50)
    found = time_weight(scheme, t)
    expected = compute_loss_weighting_for_sd3(scheme, sigmas=t)
    torch.testing.assert_close(torch.ones_like(t) if found is None else found, expected.float())


def test_a_weighted_loss_weighs_rows() -> None:
    out, target = torch.randn(2, 3, 4, 4, 4).unbind(0)
    weights = torch.tensor([2.0, 0.0, 1.0])
    expected = sum(w * ((out[i] - target[i]) ** 2).mean() for i, w in enumerate(weights)) / 3
    torch.testing.assert_close(losses.denoising(out, target, weights), expected)
    torch.testing.assert_close(losses.denoising(out, target, torch.ones(3)), losses.denoising(out, target))


@pytest.mark.parametrize("side_px", [512, 1024, 1328])
def test_the_models_own_shift_is_its_schedulers(side_px: int, tmp_path: Path) -> None:
    """Qwen-Image's: exponential, by resolution, stretched to end at 0.02; image by image of its own size."""
    family = load_family("auto", str(save_flow(tmp_path / "m", "qwen_image")), shift=None, size_px=(64, 64))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(family.pipe.scheduler.config)
    tokens = (side_px // 16) ** 2
    scheduler.set_timesteps(
        1000, sigmas=np.linspace(1, 1 / 1000, 1000), mu=calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    )
    middle = torch.arange(1000).add(0.5) / 1000
    found = family.training_time(1 - middle, (side_px // 8, side_px // 8))
    torch.testing.assert_close(found, scheduler.sigmas[:-1].float(), atol=1e-6, rtol=0)
    assert float(found.min()) == pytest.approx(0.02, abs=1e-6)
    assert len(found.unique()) == 1000


def test_a_shift_of_the_run_moves_the_times(tmp_path: Path) -> None:
    """SD3, eq. 23; a shift of 1 leaves them."""
    folder, rank = str(save_flow(tmp_path / "m", "sd3")), torch.linspace(0, 1, 11)
    one, three = (
        load_family("auto", folder, shift=s, size_px=(64, 64)).training_time(rank, (8, 8)) for s in (1.0, 3.0)
    )
    assert torch.equal(one, rank)
    torch.testing.assert_close(three, 3 * rank / (1 + 2 * rank))
