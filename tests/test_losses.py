"""Losses against the papers' equations written out, and DMD on a Gaussian whose scores are known exactly."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from train_t2i import losses
from train_t2i.schedule import EpsilonVP, per_row

PATH = EpsilonVP(tiny.ALPHAS_CUMPROD)
SHAPE = (5, 4, 3, 2)


def random(seed: int, shape=SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_dmd_direction_is_the_papers_equations_row_by_row():
    """DMD (arXiv 2311.18828) eq. 7 with the weight of eq. 8, from scores; the constant alpha of d x_t / d x is left out,
    as in the published code."""
    x0, real, fake, noise = (random(seed) for seed in range(4))
    t = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.98])
    alpha, sigma = PATH.alpha_sigma(t, x0)
    x_t = PATH.add_noise(x0, noise, t)
    expected = torch.zeros(SHAPE)
    for row in range(SHAPE[0]):
        a, s = alpha[row].item(), sigma[row].item()
        score_real = -(x_t[row] - a * real[row]) / s**2  # eq. 4
        score_fake = -(x_t[row] - a * fake[row]) / s**2  # eq. 5
        norm = (real[row] - x0[row]).abs().sum()
        weight = s**2 / a * x0[row].numel() / norm  # eq. 8: CS is the number of elements of a row
        expected[row] = weight * (score_fake - score_real)  # eq. 7
    torch.testing.assert_close(losses.dmd_direction(x0, real, fake), expected, rtol=1e-3, atol=1e-4)


def test_dmd_has_the_direction_as_gradient_and_half_its_square_as_value():
    x0, real, fake = (random(seed) for seed in range(3))
    x0.requires_grad_(True)
    direction = losses.dmd_direction(x0.detach(), real, fake)
    loss = losses.dmd(x0, real, fake)
    loss.backward()
    torch.testing.assert_close(x0.grad, direction / x0.numel(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss.detach(), 0.5 * (direction**2).mean())


def test_dmd_of_a_row_does_not_depend_on_the_others():
    x0, real, fake = (random(seed) for seed in range(3))
    real[1] *= 100  # another row far away
    together = losses.dmd_direction(x0, real, fake)
    for row in range(SHAPE[0]):
        alone = losses.dmd_direction(x0[row : row + 1], real[row : row + 1], fake[row : row + 1])
        torch.testing.assert_close(together[row], alone[0])


def test_dmd_of_half_precision_is_computed_in_fp32():
    x0, real, fake = (random(seed).half() for seed in range(3))
    expected = losses.dmd(x0.float(), real.float(), fake.float())
    assert torch.equal(losses.dmd(x0, real, fake), expected)
    assert expected.dtype == torch.float32


def test_dmd_where_the_teacher_agrees_exactly():
    x0 = random(0)
    assert torch.isfinite(losses.dmd(x0, x0, x0 + 1e-9))
    assert losses.dmd(x0, x0, x0) == 0


def test_dmd_builds_no_graph_to_the_scores():
    x0, real, fake = (random(seed).requires_grad_(True) for seed in range(3))
    losses.dmd(x0, real.detach(), fake.detach()).backward()
    assert x0.grad is not None
    assert not losses.dmd(x0.detach(), real.detach(), fake.detach()).requires_grad


@pytest.mark.parametrize("loss", [losses.denoising, losses.regression])
def test_plain_mean_squares(loss):
    a, b = random(0), random(1)
    assert float(loss(a, b)) == pytest.approx(float(((a - b) ** 2).sum() / a.numel()), rel=1e-5)
    assert torch.equal(loss(a.half(), b.half()), loss(a.half().float(), b.half().float()))


def test_hinge_pushes_up_to_the_margin_and_no_further():
    scores = torch.tensor([0.2, 0.69, 0.7, 0.9, -1.0], requires_grad=True)
    loss = losses.hinge(scores, 0.7).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.5 + 0.01 + 0 + 0 + 1.7) / 5, rel=1e-5)
    assert scores.grad.tolist() == pytest.approx([-0.2, -0.2, 0, 0, -0.2])


# -- distribution matching where the answer is known -----------------------------------------------------------------

MEAN = torch.tensor([1.5, -1.0]).reshape(2, 1, 1)
STD = torch.tensor([0.4, 1.2]).reshape(2, 1, 1)


def posterior_mean(x_t: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, std^2): the x0 estimate behind the exact score."""
    alpha, sigma = PATH.alpha_sigma(t, x_t)
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


class Affine(torch.nn.Module):
    """x = shift + scale * z, a number each channel."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2, 1, 1))
        self.scale = torch.nn.Parameter(torch.full((2, 1, 1), scale))

    def forward(self, z: Tensor) -> Tensor:
        return self.shift + self.scale * z


def assert_is_target(generator: Affine) -> None:
    torch.testing.assert_close(generator.shift.detach(), MEAN, rtol=0, atol=0.12)
    torch.testing.assert_close(generator.scale.detach().abs(), STD, rtol=0, atol=0.12)


def test_dmd_finds_a_gaussian_with_exact_scores():
    generator, rng = Affine(0.7), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.03)
    for step in range(300):
        x0 = generator(torch.randn(64, 2, 2, 2, generator=rng))
        t = 0.02 + 0.96 * torch.rand(64, generator=rng)
        x_t = PATH.add_noise(x0.detach(), torch.randn(x0.shape, generator=rng), t)
        real = posterior_mean(x_t, t, MEAN, STD)
        fake = posterior_mean(x_t, t, generator.shift.detach(), generator.scale.detach())
        loss = losses.dmd(x0, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        optimizer.step()
    assert_is_target(generator)


def test_dmd_finds_a_gaussian_with_a_learnt_fake_score():
    """The whole recipe in small: at one time the best noise estimate of a Gaussian is affine in x_t, so it is learnt by
    the denoising loss, five times as often as the generator moves."""
    generator, guidance, rng = Affine(0.7), Affine(1.0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.03)
    follower = torch.optim.Adam(guidance.parameters(), lr=0.05)
    t = torch.full((128,), 0.5)

    def noised() -> tuple[Tensor, Tensor, Tensor]:
        x0 = generator(torch.randn(128, 2, 2, 2, generator=rng))
        noise = torch.randn(x0.shape, generator=rng)
        return x0, noise, PATH.add_noise(x0.detach(), noise, t)

    for step in range(300):
        for _ in range(5):
            x0, noise, x_t = noised()
            loss = losses.denoising(guidance(x_t), PATH.target(x0, noise, t))
            follower.zero_grad()
            loss.backward()
            follower.step()
        x0, _, x_t = noised()
        fake = PATH.to_x0(x_t, guidance(x_t).detach(), t)
        loss = losses.dmd(x0, posterior_mean(x_t, t, MEAN, STD), fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        optimizer.step()
    assert_is_target(generator)
    alpha, sigma = (float(v.flatten()[0]) for v in PATH.alpha_sigma(t, per_row(t, torch.zeros(1, 1, 1, 1))))
    expected = sigma / (alpha**2 * generator.scale.detach() ** 2 + sigma**2)  # of E[eps | x_t]
    torch.testing.assert_close(guidance.scale.detach(), expected, rtol=0.2, atol=0.05)
