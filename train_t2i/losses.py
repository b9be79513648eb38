"""The losses, as small pure functions over fp32 tensors.

Shapes: x0, real, fake are (B, C, H, W) clean estimates; scores are (B,).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def denoising(out: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Scalar: mean squared error of a network's output (DMDR: plain, DMD2 eq. 3), of each row ``weights`` (B,) times."""
    if weights is None:
        return F.mse_loss(out.float(), target.float())
    return (weights * (out.float() - target.float()).square().flatten(1).mean(1)).mean()


def regression(x: Tensor, target: Tensor, huber_delta: float = 0.0) -> Tensor:
    """Scalar: mean squared error between the student's latents and the teacher's (Direct Distillation; DMD's ODE init).

    With a ``huber_delta`` d, differences above it count linearly (Huber 1964): 0.5 e^2 below, d (|e| - d / 2) above.
    """
    if huber_delta > 0:
        return F.huber_loss(x.float(), target.float(), delta=huber_delta)
    return F.mse_loss(x.float(), target.float())


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """Scalar: mean of 1 - cos over two (B, D) of length one, what a tower sees in the student's and the teacher's images."""
    return (1 - (features * target).sum(-1)).mean()


def dmd_direction(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(B, C, H, W): the normalised difference of scores; the generator moves against it.

    DMD (arXiv 2311.18828) eqs. 7 and 8, written with clean estimates: d = (fake - real) / mean_CHW |x0 - real|.
    """
    scale = (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (fake - real) / (scale + 1e-8)


def dmd(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Scalar whose gradient to ``x0`` (with grad) is ``dmd_direction / x0.numel()``; its value is 0.5 mean d^2."""
    x0 = x0.float()
    direction = dmd_direction(x0.detach(), real.float(), fake.float())
    return 0.5 * F.mse_loss(x0, x0.detach() - direction)


def hinge(scores: Tensor, margin: float) -> Tensor:
    """(B,): relu(margin - score), the ReFL loss of DMDR; linear in the reward until it reaches the margin."""
    return F.relu(margin - scores.float())
