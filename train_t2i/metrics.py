"""Distances between two sets of images in a feature space, and intervals of means: pure functions of tensors.

Shapes: (N, D) and (M, D) features, a row an image; computed in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    """The symmetric root of a symmetric positive semi-definite (D, D) matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_of_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians with means (D,) and covariances (D, D)."""
    # Dowson and Landau 1982: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)
    root = symmetric_sqrt(cov_a)
    inner = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    squared = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(squared))


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two sets of features (Heusel et al. 2017, arXiv 1706.08500); 0 for equal sets."""
    a, b = _wide(features_a), _wide(features_b)
    return frechet_of_moments(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def coverage(covered: Tensor, manifold: Tensor, *, k: int = 3) -> float:
    """Share of the rows of ``covered`` that lie within the ``k``-nearest-neighbour balls of ``manifold``, in [0, 1].

    Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1: f = 1 iff |x - y| <= |y - NN_k(y)| for some y of the manifold,
    NN_k taken among the other rows of the manifold.
    """
    covered, manifold = _wide(covered), _wide(manifold)
    if len(manifold) <= k:
        raise ValueError(f"a manifold of {len(manifold)} rows has no {k} neighbours a row")
    # exact: the expansion |a|^2 + |b|^2 - 2ab loses the small distances that this is about
    within = torch.cdist(manifold, manifold, compute_mode="donot_use_mm_for_euclid_dist")
    radii = within.fill_diagonal_(torch.inf).kthvalue(k, dim=1).values
    across = torch.cdist(covered, manifold, compute_mode="donot_use_mm_for_euclid_dist")
    return float((across <= radii).any(dim=1).double().mean())


LEAST_ROWS = 4  # of either set, for recall and precision: each has three neighbours


def recall(generated: Tensor, reference: Tensor, *, k: int = 3) -> float:
    """Diversity: the share of reference images that the generated manifold covers."""
    return coverage(reference, generated, k=k)


def precision(generated: Tensor, reference: Tensor, *, k: int = 3) -> float:
    """Fidelity: the share of generated images that the reference manifold covers."""
    return coverage(generated, reference, k=k)


def kernel_distance(features_a: Tensor, features_b: Tensor, *, gamma: float | None = None, rows: int = 1024) -> float:
    """KID: the unbiased squared MMD under k(x, y) = (gamma x.y + 1)^3, over all pairs of rows; for equal sets below 0.

    Binkowski et al. 2018, arXiv 1801.01401, section 3; ``gamma`` None is theirs, 1 / D.  For features of length one give
    1: the kernel of the cosine, where 1 / D would leave almost a linear one.  ``rows`` of one set are multiplied at once.
    """
    a, b = _wide(features_a), _wide(features_b)
    scale = 1 / a.shape[1] if gamma is None else gamma

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(scale * part @ y.T + 1).pow(3).sum() for part in x.split(rows)]).sum()

    def within(x: Tensor) -> Tensor:
        own = (scale * x.square().sum(1) + 1).pow(3).sum()
        return (total(x, x) - own) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def spread(features: Tensor) -> Tensor:
    """(S, P, D) features of length one, S images of each of P prompts -> (P,) fp64: the mean 1 - cosine of its pairs.

    0 where all seeds give one image; the number that falls when a reward narrows what a generator makes.
    """
    count = len(features)
    if count < 2:
        raise ValueError("images of one prompt are apart from one another: give two at least")
    wide = features.detach().double().cpu()
    # sum over i != j of x_i.x_j = |sum of x|^2 - sum of |x|^2
    cosines = wide.sum(0).square().sum(-1) - wide.square().sum((0, 2))
    return 1 - cosines / (count * (count - 1))


def wilson_interval(share: float, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """(low, high) of a share in [0, 1] of ``count`` independent trials (Wilson 1927); unlike a bootstrap's it is not a
    point where all trials agree.  ``z`` 1.96: 95 %."""
    if count < 1:
        raise ValueError("no trials")
    square = z * z / count
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_ci(values: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(low, high) percentile bootstrap interval of the mean of (N,) values; the same for the same seed."""
    wide = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    rounds = [wide[torch.randint(len(wide), (len(wide),), generator=generator)].mean() for _ in range(resamples)]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(rounds), tails).tolist()
    return low, high


def _wide(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are (N, D) with N >= 2, not {tuple(features.shape)}")
    return features.detach().double().cpu()


def _covariance(features: Tensor) -> Tensor:
    """(D, D), unbiased."""
    return torch.atleast_2d(torch.cov(features.T))
