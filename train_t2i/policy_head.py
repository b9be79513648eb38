"""The last layer of a network that says a policy: in the place of ``proj_out``, many velocities and how they are mixed.

Shapes: B rows; T image tokens of width D; K components; C latent channels; a token holds 2 x 2 latent cells, channel order
(c, dy, dx), so that what is unpacked has (B, channels, H, W) with the channels that policies.py and gmflow.py split.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

CELLS = 4  # latent cells of a token
BIAS_STD = 0.05  # of the components' biases, so that equal copies of the teacher's layer part
FIRST_MOMENTUM, LAST_MOMENTUM = 0.2, 4.0  # ArcFlow: the K - 1 momenta begin evenly spaced between their logarithms


class PolicyHead(nn.Module):
    """Linear layers that begin as the teacher's velocity in every component, equal gates, and fixed momenta.

    ``policy`` momentum: K C means, K gates, K - 1 log-momenta; gmflow: K C means, K gates, and what all tokens' mean is the
    logarithm of, the deviation.  ``base`` is the network's own linear layer.
    """

    def __init__(self, base: Any, policy: str, num_components: int) -> None:
        super().__init__()
        width = base.in_features
        self.means = nn.Linear(width, num_components * base.out_features)
        self.gates = _silent(width, num_components * CELLS)
        self.log_momenta = (
            _silent(width, (num_components - 1) * CELLS) if policy == "momentum" and num_components > 1 else None
        )
        self.log_std = _silent(width, CELLS) if policy == "gmflow" else None
        with torch.no_grad():
            self.means.weight.copy_(base.weight.float().repeat(num_components, 1))
            biases = torch.zeros(num_components, base.out_features // CELLS, 1)  # the same in a token's cells
            if num_components > 1:
                biases += BIAS_STD * torch.randn_like(biases)
            self.means.bias.copy_(biases.expand(-1, -1, CELLS).flatten())
            if base.bias is not None:
                self.means.bias.add_(base.bias.float().repeat(num_components))
            if self.log_momenta is not None:
                first, last = math.log(FIRST_MOMENTUM), math.log(LAST_MOMENTUM)
                momenta = torch.linspace(first, last, num_components - 1)
                self.log_momenta.bias.copy_(momenta.repeat_interleave(CELLS))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, channels * 4)."""
        return torch.cat([layer(tokens) for layer in self.layers()], dim=-1)

    def layers(self) -> list[nn.Linear]:
        """Those that there are, in the order of their channels."""
        wanted = (self.means, self.gates, self.log_momenta, self.log_std)
        return [layer for layer in wanted if layer is not None]

    def as_linear(self) -> nn.Linear:
        """One layer of the same output, as a stock network of that many channels has it."""
        layers = self.layers()
        whole = nn.Linear(self.means.in_features, sum(layer.out_features for layer in layers))
        with torch.no_grad():
            whole.weight.copy_(torch.cat([layer.weight for layer in layers]))
            whole.bias.copy_(torch.cat([layer.bias for layer in layers]))
        return whole


def _silent(width: int, outputs: int) -> nn.Linear:
    """A layer that says 0."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
