"""Distances, recall, precision, spread and intervals, against closed forms, plain loops and torchmetrics."""

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


class Flat(torch.nn.Module):
    """The feature extractor of torchmetrics where images are features already."""

    num_features = 4

    def forward(self, images):
        return images.flatten(1)


def theirs(kind, a, b, **options):
    metric = kind(feature=Flat(), **options)
    metric.set_dtype(torch.float64)
    metric.update(a.reshape(-1, 1, 2, 2), real=True)
    metric.update(b.reshape(-1, 1, 2, 2), real=False)
    return metric.compute()


def test_frechet_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = normal(50, 4), 2 * normal(70, 4, seed=1) + 1
    found = theirs(FrechetInceptionDistance, a, b, input_img_size=(1, 2, 2))
    assert metrics.frechet(a, b) == pytest.approx(float(found), rel=1e-6)


# -- kernel distance -------------------------------------------------------------------------------------------------


def test_kernel_distance_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = normal(40, 4), 1.5 * normal(40, 4, seed=1) + 0.5
    for gamma in (None, 1.0):  # one subset of all rows: no draw is left
        mean, _ = theirs(KernelInceptionDistance, a, b, subsets=1, subset_size=40, gamma=gamma)
        assert metrics.kernel_distance(a, b, gamma=gamma) == pytest.approx(float(mean), rel=1e-5)
        assert metrics.kernel_distance(a, b, gamma=gamma, rows=7) == pytest.approx(float(mean), rel=1e-5)


def test_kernel_distance_has_no_bias():
    """Sets of one distribution come out around 0 however few rows they have; of other sizes as well."""
    found = [metrics.kernel_distance(normal(6, 3, seed=i), normal(9, 3, seed=1000 + i)) for i in range(400)]
    values = torch.tensor(found)
    assert abs(values.mean()) < 3 * values.std() / 20
    assert values.min() < 0
    assert metrics.kernel_distance(normal(50, 3), normal(50, 3, seed=1) + 2) > 10 * values.std()


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


# -- spread of the images of a prompt --------------------------------------------------------------------------------


def test_spread_is_the_mean_over_pairs():
    features = torch.nn.functional.normalize(normal(5, 3, 8), dim=-1)
    found = metrics.spread(features)
    for prompt in range(3):
        pairs = [1 - float(features[i, prompt] @ features[j, prompt]) for i in range(5) for j in range(i)]
        assert found[prompt] == pytest.approx(sum(pairs) / 10, rel=1e-12)
    assert metrics.spread(features[:1].expand(4, 3, 8)) == pytest.approx([0, 0, 0], abs=1e-12)
    with pytest.raises(ValueError, match="two at least"):
        metrics.spread(features[:1])


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


def test_wilson_interval():
    """Figures of Brown, Cai and DasGupta 2001's formula, worked by hand; symmetric, and never a point."""
    low, high = metrics.wilson_interval(0.5, 4, z=2.0)
    assert (low, high) == pytest.approx((0.5 - 0.5 / 2**0.5, 0.5 + 0.5 / 2**0.5))
    assert metrics.wilson_interval(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-5)  # 10 / (10 + z^2)
    for share in (0.0, 0.3, 0.9):
        low, high = metrics.wilson_interval(share, 25)
        assert low <= share <= high
        assert (1 - high, 1 - low) == pytest.approx(metrics.wilson_interval(1 - share, 25))
        for end in (low, high):  # the ends are the shares from which this one is z standard errors away
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / 25) ** 0.5)
    with pytest.raises(ValueError, match="no trials"):
        metrics.wilson_interval(0.5, 0)
