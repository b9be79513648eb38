"""All randomness of a run as a function of a counter: nothing to save, nothing that batch size or world size can change.

Every draw is keyed by (seed, tick, stream, sample index) through Philox, a counter-based generator, so row ``i`` of the
run gets the same noise whether it is computed alone, in a batch, on another process or after a resume.
Shapes: B rows of this process.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


def row_generator(seed: int, tick: int, stream: str, index: int) -> np.random.Generator:
    """The generator of one row in one stream.  The lowest counter word is left to Philox itself."""
    key = np.array([seed & _MASK_64, zlib.crc32(stream.encode())], dtype=np.uint64)
    counter = np.array([0, tick & _MASK_64, index & _MASK_64, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class Draw:
    """Draws for the rows ``indices`` at ``tick``; ``stream`` names what a draw is for, so no two uses share numbers."""

    seed: int
    tick: int
    indices: Sequence[int]
    device: torch.device

    def on_host(self) -> Draw:
        """The same draws on the CPU: for what the program itself reads, which must not wait for the device."""
        return replace(self, device=torch.device("cpu"))

    def _rows(self, stream: str) -> list[np.random.Generator]:
        return [row_generator(self.seed, self.tick, stream, index) for index in self.indices]

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) fp32, standard normal, drawn on the CPU whatever the device."""
        rows = [rng.standard_normal(tuple(shape), dtype=np.float32) for rng in self._rows(stream)]
        return self._there(torch.from_numpy(np.stack(rows)))

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B,) fp32, uniform in [low, high)."""
        return self._scalars([low + (high - low) * rng.random() for rng in self._rows(stream)])

    def uniforms(self, stream: str, count: int) -> Tensor:
        """(B, count) fp32, uniform in [0, 1)."""
        rows = [rng.random(count, dtype=np.float32) for rng in self._rows(stream)]
        return self._there(torch.from_numpy(np.stack(rows)))

    def beta(self, stream: str, a: float, b: float) -> Tensor:
        """(B,) fp32, Beta(a, b)."""
        return self._scalars([rng.beta(a, b) for rng in self._rows(stream)])

    def logit_normal(self, stream: str, mean: float, std: float) -> Tensor:
        """(B,) fp32 in (0, 1): the sigmoid of a normal."""
        return self._scalars(
            [1.0 / (1.0 + np.exp(-(mean + std * rng.standard_normal()))) for rng in self._rows(stream)]
        )

    def integers(self, stream: str, count: int) -> Tensor:
        """(B,) int64, uniform in 0..count-1."""
        return self._there(torch.tensor([int(rng.integers(count)) for rng in self._rows(stream)]))

    def _scalars(self, values: list[float]) -> Tensor:
        return self._there(torch.tensor(values, dtype=torch.float32))

    def _there(self, drawn: Tensor) -> Tensor:
        """On the device, without a wait for it; a tensor that is made there from host values waits."""
        return drawn.to(self.device, non_blocking=True)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], devices: Sequence[str] = ()) -> Tensor:
    """(B, *shape) fp32 noise from user-visible seeds, as ``torch.Generator`` draws it: what pipelines call a seed.

    ``devices``: whose generator draws each row, ``cpu`` unless given; another device's draws are other numbers.
    """

    def row(seed: int, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(int(seed))
        return torch.randn(tuple(shape), generator=generator, device=device).cpu()

    return torch.stack([row(seed, device) for seed, device in zip(seeds, devices or ["cpu"] * len(seeds), strict=True)])
