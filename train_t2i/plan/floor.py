"""The least that a step has to compute and to move on one device: the floor that measured seconds stand on."""

from __future__ import annotations

from dataclasses import dataclass

from train_t2i.config import Config
from train_t2i.engine import DTYPES
from train_t2i.plan.estimate import FP32_BYTES, adam_bytes, gradient_share
from train_t2i.plan.rehearsal import Rehearsal


@dataclass(frozen=True)
class Floor:
    """Of one step.  ``read``: the weights of each network call, once forward and once backward.

    ``updated``: gradients written and read, masters and moments read and written, once an update; moments that wait on the
    host once more as they come and leave, which is ``bus`` too, in bytes of both directions.
    """

    network: dict[str, float]  # phase -> FLOPs of its network calls
    rest: float  # FLOPs of decoders and rewards
    again: float  # FLOPs that checkpointing makes a second time: no part of the least
    read: float
    updated: float
    bus: float = 0.0

    @property
    def flops(self) -> float:
        return sum(self.network.values()) + self.rest

    @property
    def moved(self) -> float:
        return self.read + self.updated


def floor(run: Config, found: Rehearsal, world: int) -> Floor:
    network, rest, again, read, updated, bus = {}, 0.0, 0.0, 0.0, 0.0, 0.0
    for phase, work in found.work.items():
        simulated = found.simulation if phase == "rollout" else None
        times = run.gradient_accumulation_steps * (simulated.mean if simulated else found.times[phase])
        network[phase] = times * work.network
        rest, again = rest + times * work.rest, again + times * work.again
        for call in work.calls:
            read += times * (2 if call.builds_graph else 1) * weight_bytes(run, found, call.module)
    for role, count in found.trained.items():
        elements = found.times[role] * count * gradient_share(run, world)
        moved = 2 * adam_bytes(run) * elements
        bus += moved if run.offload_optimizer else 0.0
        updated += elements * 4 * FP32_BYTES + moved
    return Floor(network, rest, again, read, updated + bus, bus)


def weight_bytes(run: Config, found: Rehearsal, module: str) -> float:
    """What a call of a module has to read, in the format of network calls; codes where the base lies in codes."""
    weights = found.modules[module]
    return weights.frozen_bytes or weights.num_elements * DTYPES[run.mixed_precision].itemsize


@dataclass(frozen=True)
class Card:
    """FLOP/s of dense half-precision products that are summed in fp32, and bytes/s of its memory, as its maker states."""

    flops: float
    memory: float


# What is in the name that CUDA gives a device -> its card; the first that is.
# Sources: NVIDIA's data sheets (half of the figures that they give "with sparsity"), Ada's white paper (appendix A).
CARDS = {
    "B200": Card(2250e12, 8.0e12), "H200": Card(989e12, 4.8e12), "H100 NVL": Card(835e12, 3.9e12),
    "H100 PCIe": Card(756e12, 2.0e12), "H100": Card(989e12, 3.35e12), "A100": Card(312e12, 2.0e12),
    "L40S": Card(362e12, 0.864e12), "RTX 4090": Card(165e12, 1.008e12), "RTX 3090": Card(71e12, 0.936e12),
}  # fmt: skip
NAMED = ("RTX 4090", "A100", "H100", "B200")  # those that a plan names


def card_of(device_name: str) -> Card | None:
    return next((card for name, card in CARDS.items() if name in device_name), None)


def least_seconds(least: Floor, card: Card) -> float:
    """All products at the stated rate, or all bytes, whichever takes longer."""
    return max(least.flops / card.flops, least.moved / card.memory)
