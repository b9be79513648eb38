"""Frechet distance, recall, precision and intervals, against closed forms and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from train_t2i import metrics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def covariance(size, seed):
    root = normal(size, size, seed=seed)
    return root @ root.T


# -- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean_a, mean_b = vector(0.0, 1.0, -2.0), vector(1.0, 1.0, 0.5)
    deviations_a, deviations_b = vector(1.0, 2.0, 0.5), vector(2.0, 0.1, 0.5)
    # diagonal: sum (m_a - m_b)^2 + sum (s_a - s_b)^2
    expected = (1 + 0 + 6.25) + (1 + 3.61 + 0)
    found = metrics.frechet_of_moments(mean_a, deviations_a.square().diag(), mean_b, deviations_b.square().diag())
    assert found == pytest.approx(expected, rel=1e-12)
    turn = torch.linalg.qr(normal(3, 3)).Q  # the distance does not change when both are turned
    turned = [turn @ s.square().diag() @ turn.T for s in (deviations_a, deviations_b)]
    assert metrics.frechet_of_moments(turn @ mean_a, turned[0], turn @ mean_b, turned[1]) == pytest.approx(expected)


def test_frechet_of_any_gaussians_is_that_of_the_eigenvalues_of_the_product():
    a, b, zero = covariance(6, 1), covariance(6, 2), torch.zeros(6).double()
    # tr (C_a C_b)^1/2 from the spectrum of the product itself, which is not symmetric
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * cross)
    assert metrics.frechet_of_moments(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_of_moments(zero, b, zero, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_features():
    features = normal(40, 5)
    assert metrics.frechet(features, features) == pytest.approx(0, abs=1e-9)
    moved = features + torch.tensor([3.0, 4.0, 0, 0, 0])
    assert metrics.frechet(features, moved) == pytest.approx(25, rel=1e-9)
    assert metrics.frechet(features, 3 * features) == pytest.approx(
        float(4 * torch.cov(features.T).trace() + 4 * features.mean(0).square().sum()), rel=1e-9
    )


def test_frechet_with_fewer_rows_than_features():
    a, b = normal(6, 30), normal(9, 30, seed=1)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-5)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a), rel=1e-6)


def test_frechet_matches_sampled_gaussians():
    """A large sample of known Gaussians comes near their own distance: unbiased covariance, no factor lost."""
    a = normal(200_000, 2) * torch.tensor([1.0, 2.0])
    b = normal(200_000, 2, seed=1) * torch.tensor([2.0, 2.0]) + torch.tensor([0.0, 1.0])
    assert metrics.frechet(a, b) == pytest.approx(1 + 1, abs=0.03)
    assert metrics.frechet(a[:2], a[:2] * 0) == pytest.approx(
        float(a[:2].mean(0).square().sum() + (a[0] - a[1]).square().sum() / 2), rel=1e-9
    )


# -- recall and precision --------------------------------------------------------------------------------------------


def covered_by_loops(covered, manifold, k):
    """Kynkaanniemi et al. 2019, word by word."""
    hits = 0
    for point in covered.tolist():
        for i, centre in enumerate(manifold.tolist()):
            others = sorted(math.dist(centre, other) for j, other in enumerate(manifold.tolist()) if j != i)
            if math.dist(point, centre) <= others[k - 1]:
                hits += 1
                break
    return hits / len(covered)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recall_and_precision_are_those_of_plain_loops(k, seed):
    generated, reference = normal(23, 4, seed=seed), 1.5 * normal(31, 4, seed=seed + 10)
    assert metrics.recall(generated, reference, k=k) == covered_by_loops(reference, generated, k)
    assert metrics.precision(generated, reference, k=k) == covered_by_loops(generated, reference, k)


def test_recall_sees_what_is_missing_and_precision_what_is_wrong():
    here, there = 0.1 * normal(20, 3), 0.1 * normal(20, 3, seed=1) + 50
    collapsed = 0.1 * normal(20, 3, seed=2)
    both = torch.cat([here, there])
    assert metrics.recall(collapsed, both) <= 0.5
    assert metrics.precision(collapsed, both) >= 0.9
    assert metrics.recall(both, here) == 1.0
    assert metrics.precision(both, here) == pytest.approx(0.5)


def test_a_manifold_needs_neighbours():
    with pytest.raises(ValueError, match="neighbours"):
        metrics.recall(normal(3, 2), normal(10, 2))


# -- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_a_mean():
    values = 2 + 3 * normal(400)
    low, high = metrics.bootstrap_ci(values, seed=1)
    assert (low, high) == metrics.bootstrap_ci(values, seed=1)
    assert (low, high) != metrics.bootstrap_ci(values, seed=2)
    mean, error = float(values.mean()), float(values.std()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)  # the central limit theorem
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    narrow = metrics.bootstrap_ci(values, seed=1, level=0.5)
    assert low < narrow[0] < mean < narrow[1] < high


def test_interval_of_shares():
    assert metrics.bootstrap_ci(torch.ones(50)) == (1.0, 1.0)
    low, high = metrics.bootstrap_ci(torch.tensor([1.0] * 95 + [0.0] * 5))
    assert 0.88 < low < 0.95 < high < 1.0
