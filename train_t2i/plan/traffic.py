"""Bytes that each process sends in a step, for any number of processes (docs/distributed.md has the formulae in words).

A rehearsal says what a step calls and trains.  Payloads are whole tensors: an all-reduce of n bytes costs each of W
processes 2 n (W - 1) / W, a gather or a scatter half of that (rings).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from train_t2i.config import Config
from train_t2i.engine import DTYPES
from train_t2i.plan.estimate import FP32_BYTES, GB
from train_t2i.plan.rehearsal import Piece, Rehearsal

WORLDS = (8, 64, 1000)


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of a step."""

    reduced: float
    gathered: float
    twice: bool  # reductions leave the sum on all processes

    def sent(self, world: int) -> float:
        """By each process."""
        return ((2 if self.twice else 1) * self.reduced + self.gathered) * (world - 1) / world


def traffic(run: Config, found: Rehearsal, backend: str, world: int) -> Traffic:
    gradients = sum(FP32_BYTES * found.times[role] * count for role, count in found.trained.items())
    micro = run.gradient_accumulation_steps
    if backend == "ddp":  # summed on a process first, then one flat vector an update
        return Traffic(gradients, 0, twice=True)
    if backend == "zero2":
        return Traffic(micro * gradients, gradients, twice=True)
    if backend == "zero3":
        return Traffic(micro * gradients, whole_gathers(run, found), twice=False)
    return Traffic(micro * scattered(found, world), block_gathers(run, found, world), twice=False)


def padded(piece: Piece, world: int) -> int:
    """Elements of a kind of parameter once its rows are shared out evenly: FSDP2 fills up what W does not divide."""
    return piece.count * piece.width * -(-piece.rows // world) * world


def scattered(found: Rehearsal, world: int) -> int:
    """FSDP2: bytes of all gradients of a step's updates."""
    pieces = [piece for module in found.modules.values() for piece in module.pieces]
    return sum(FP32_BYTES * found.times[p.role] * padded(p, world) for p in pieces if p.role is not None)


def times_of(run: Config, found: Rehearsal, phase: str) -> int:
    """How often a step makes the calls of a phase, where every process makes every call."""
    simulated = found.simulation if phase == "rollout" else None
    return run.gradient_accumulation_steps * (simulated.all if simulated else found.times[phase])


def block_gathers(run: Config, found: Rehearsal, world: int) -> float:
    """FSDP2: a block is gathered for each forward and each backward pass; what lies outside blocks is kept between them."""
    low = DTYPES[run.mixed_precision].itemsize

    def size(module: str, inside: bool) -> float:
        return low * sum(padded(p, world) for p in found.modules[module].pieces if p.inside == inside)

    total = 0.0
    for phase, work in found.work.items():
        for call in work.calls:
            passes = 2 if call.builds_graph else 1
            total += passes * times_of(run, found, phase) * size(call.module, inside=True)
    return total + sum(times * size(module, inside=False) for module, times in outer_gathers(run, found))


def outer_gathers(run: Config, found: Rehearsal) -> Iterator[tuple[str, int]]:
    """(module, times in a step) for each gather of what lies outside blocks: kept until a backward pass or an update ends."""
    whole: set[str] = set()
    for phase, times in found.times.items():  # the rollout, then each role's update
        for _ in range(run.gradient_accumulation_steps):
            calls = found.work[phase].calls
            for call in calls:
                if call.module not in whole:
                    yield call.module, times
                whole.add(call.module)
            whole -= {call.module for call in calls if call.builds_graph}
        if phase != "rollout":
            whole.clear()


def whole_gathers(run: Config, found: Rehearsal) -> float:
    """ZeRO-3: every call gathers its module, masters in fp32.  Less is sent where tensors are small, and kept whole."""
    total = 0.0
    for phase, work in found.work.items():
        for call in work.calls:
            module = found.modules[call.module]
            trained = sum(p.count * p.rows * p.width for p in module.pieces if p.role is not None)
            passes = 2 if call.builds_graph else 1
            total += passes * times_of(run, found, phase) * (module.frozen_bytes + FP32_BYTES * trained)
    return total


def told_traffic(run: Config, found: Rehearsal, world: int) -> list[str]:
    """The volume on every backend, for this many processes and for others."""
    worlds = sorted({*WORLDS, world} - {1})
    backends = ("ddp",) if run.base_quant != "none" else ("ddp", "zero2", "fsdp2", "zero3")  # codes are not shared out
    rows = run.batch_size * run.gradient_accumulation_steps * found.times["rollout"]
    lines = [
        "each process sends in a step, GB:",
        "  processes" + "".join(f"{n:>10}" for n in worlds),
        "  images   " + "".join(f"{n * rows:>10}" for n in worlds),
    ]
    for backend in backends:
        sent = (traffic(run, found, backend, n).sent(n) / GB for n in worlds)
        lines.append(f"  {backend:<9}" + "".join(f"{n:>10.2f}" for n in sent))
    return lines
