"""Sampling with an ArcFlow student, in diffusers: the model's own pipeline, whose steps follow what the network says.

The network's last layer says, for each token of 2 x 2 latent cells, K velocities (K * 64 numbers), K gates and K - 1 log-momenta
(4 numbers each): v(sigma) = sum_k p_k mu_k exp(g_k (source - sigma)), g_0 = 0 (ArcFlow, arXiv 2602.09014).  A step from
source to sigma is its integral, a closed form.  This file needs torch and diffusers alone; exported folders hold a copy:

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

CELLS = 4  # latent cells of a token
EXACT, LIMIT = 6.0, 8.0  # log-momenta are exact up to 6, and stay within 8


def step_along(out: Tensor, sample: Tensor, source: Tensor, end: Tensor) -> Tensor:
    """(B, T, K * 64 + K * 4 + (K - 1) * 4) said of (B, T, 64) at ``source`` -> (B, T, 64) at ``end``, fp32."""
    out, x = out.float(), sample.float()
    width = x.shape[-1]
    count = (out.shape[-1] + CELLS) // (width + 2 * CELLS)
    means, gates, momenta = out.split([count * width, count * CELLS, (count - 1) * CELLS], dim=-1)
    means = means.unflatten(-1, (count, width // CELLS, CELLS))
    gates = gates.unflatten(-1, (count, 1, CELLS)).softmax(dim=-3)
    momenta = momenta.reshape(*momenta.shape[:-1], count - 1, 1, CELLS)
    exact = momenta.clamp(-EXACT, EXACT)
    bounded = exact + (LIMIT - EXACT) * torch.tanh((momenta - exact) / (LIMIT - EXACT))
    z = torch.cat([torch.zeros_like(gates[..., :1, :, :]), bounded], dim=-3) * (source - end)
    # integral of exp(g (source - s)) over s from end to source, divided by source - end: (e^z - 1) / z
    small = z.abs() < 1e-2
    divisor = torch.where(small, 1.0, z)
    share = torch.where(small, 1 + z / 2 * (1 + z / 3 * (1 + z / 4)), torch.expm1(divisor) / divisor)
    return x - (source - end) * (gates * share * means).sum(dim=-3).flatten(-2)


class PolicyScheduler(FlowMatchEulerDiscreteScheduler):
    """Its times; a step is the network's own way between two of them."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        if self.step_index is None:
            self._init_step_index(timestep)
        source, end = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self._step_index += 1
        return (step_along(model_output, sample, source, end).to(sample.dtype),)


class PolicyPipeline(FluxPipeline):
    """The model's own pipeline with that scheduler; to be called with the ``num_inference_steps`` of recommended.json."""

    def register_modules(self, **modules: Any) -> None:
        if isinstance(scheduler := modules.get("scheduler"), FlowMatchEulerDiscreteScheduler):
            modules["scheduler"] = PolicyScheduler.from_config(scheduler.config)
        super().register_modules(**modules)
