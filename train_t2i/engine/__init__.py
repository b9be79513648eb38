"""Everything distributed, and everything that touches an optimizer: the only importer of accelerate and deepspeed.

One optimizer a trained role, on one of four backends (backends.py, zero.py).  Here is what is the same on all: precision,
the agreement of all processes on a non-finite update, which is skipped as a whole, and collective sums.
"""

from __future__ import annotations

import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from train_t2i.engine import average, state
from train_t2i.engine.adam import AdamSettings, LossScale, set_rate
from train_t2i.engine.asked import Flags, asked
from train_t2i.engine.backends import FSDP2, Backend, Replicated
from train_t2i.engine.processes import start_processes
from train_t2i.engine.state import RoleState
from train_t2i.engine.zero import ZeRO

__all__ = ["DTYPES", "AdamSettings", "Engine", "Flags", "PartialState", "RoleState", "StepReport"]

T = TypeVar("T")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepReport:
    """What an update did: () the gradient norm before clipping, and () 1 where it was skipped as non-finite, else 0.

    Both lie on the device: who reads them waits for it.
    """

    grad_norm: Tensor
    skipped: Tensor


class Engine:
    """Device, processes, precision, and the optimizers of the trained roles."""

    def __init__(self, flags: Flags, backend: str = "auto", wait_s: float = 1800) -> None:
        """``wait_s``: how long a collective waits for the other processes before it raises.

        Raises UserError where the launcher asks for what these flags contradict, or for what is not done here.
        """
        self.state = start_processes(timedelta(seconds=wait_s))
        self.device = self.state.device
        self.rank, self.world = self.state.process_index, self.state.num_processes
        self.dtype = DTYPES[flags.mixed_precision]
        self.max_grad_norm = flags.max_grad_norm
        self.asked = asked(backend, flags, self.world, os.environ)
        # one process has nothing to share: plain training is the same sums without the machinery
        self.backend_name = self.asked.backend if self.world > 1 else "ddp"
        self.backend = self._make_backend()
        self.scales: dict[str, LossScale] = {}
        self._bad: dict[str, Tensor] = {}

    def _make_backend(self) -> Backend:
        if self.backend_name == "ddp":
            return Replicated(self.device, self.world)
        if self.backend_name == "fsdp2":
            return FSDP2(self.device, self.world, self.dtype, self.asked.blocks)
        return ZeRO(self.device, int(self.backend_name[-1]), self.max_grad_norm, self.asked.deepspeed)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def told(self) -> tuple[str, ...]:
        """What a person should know of what the launcher asked for."""
        return self.asked.told

    @property
    def calls_need_all(self) -> bool:
        """Whether all processes must take part in every call of a network: each holds only a share of its weights."""
        return self.backend.sharded

    def autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def seed(self, seed: int, tick: int) -> None:
        """The global generators serve only dropout inside networks; they are a function of the tick too."""
        mixed = (seed * 1_000_003 + tick * 8_191 + self.rank) % (1 << 31)
        random.seed(mixed)
        np.random.seed(mixed)
        torch.manual_seed(mixed)

    # -- networks and updates ------------------------------------------------------------------------------------

    def place(self, net: nn.Module, blocks: tuple[str, ...]) -> None:
        """Put a network, whose trainable parameters are marked, on the device; shard it where the backend does."""
        self.backend.place(net, blocks)

    def prepare(self, role: str, net: nn.Module, named: dict[str, nn.Parameter], adam: AdamSettings) -> nn.Module:
        """Make the role's optimizer; the module to call where the role builds a graph."""
        entry = self.backend.prepare(role, net, named, adam)
        self.scales[role] = LossScale.of(self.dtype)
        self._bad[role] = torch.zeros((), dtype=torch.bool, device=self.device)
        return entry

    def set_lr(self, role: str, learning_rate: float) -> None:
        set_rate(self.backend.optimizers[role], learning_rate)

    def backward(self, role: str, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients, ``last`` before a step; never rescales but for the fp16 loss scale."""
        self._bad[role] |= ~torch.isfinite(loss.detach())
        self.backend.backward(role, loss, self.scales[role].scale, last)

    def step(self, role: str) -> StepReport:
        """Average over processes, agree on finiteness, clip, step, zero.

        Waits for the device only where the host has to know: for an optimizer that cannot skip by itself, or a loss scale.
        """
        scale = self.scales[role]
        norm = self.backend.gradient_norm(role, scale.scale)
        skipped = self._vote(self._bad[role] | ~torch.isfinite(norm))
        self._bad[role].zero_()
        if not scale.enabled and self.backend.skips_on_device(role):
            self.backend.update(role, norm, self.max_grad_norm, skipped)
            return StepReport(norm, skipped)
        bad = bool(skipped)
        if bad:
            self.backend.skip(role)
        else:
            self.backend.update(role, norm, self.max_grad_norm)
        scale.update(bad)
        return StepReport(norm, skipped)

    def _vote(self, flags: Tensor) -> Tensor:
        """fp32 of the same shape: 1 on all processes where a flag is set on one."""
        votes = flags.float()
        if self.world > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return votes

    def average(self, role: str, decay: float) -> None:
        """Bring the role's moving average up to its weights: ema <- weights + decay (ema - weights)."""
        average.average(self.backend.pieces(role), self.backend.optimizers[role], decay, self._here(role))

    def averaged(self, role: str) -> AbstractContextManager[None]:
        """The role's network with its moving average in the place of its weights, where it has one."""
        return average.averaged(
            self.backend.pieces(role), self.backend.optimizers[role], lambda: self.backend.refresh(role)
        )

    def _here(self, role: str) -> state.Here:
        offloaded = self.backend.offloaded.get(role)
        return offloaded.here if offloaded else state.always_here

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def role_state(self, role: str) -> RoleState:
        """The role's whole state on the main process, in memory of its own; empty elsewhere.  All processes call it."""
        pieces = self.backend.pieces(role)
        if role in self.backend.offloaded:
            self.backend.offloaded[role].settle()
        holders = 1 if self.backend_name == "ddp" else self.world
        found = state.collect(pieces, self.backend.optimizers[role], self.rank, holders)
        return replace(found, scaler=self.scales[role].state())

    def fits(self, role: str, saved: RoleState) -> bool:
        """Whether a checkpoint's weights are of this role's parameters."""
        pieces = self.backend.pieces(role)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.model.items()}
        same_count = len(shapes) == len(self.backend.named[role])
        return same_count and all(shapes.get(piece.name) == piece.shape for piece in pieces)

    def load_role(self, role: str, saved: RoleState) -> None:
        """Put a checkpoint's state in, from whatever backend and number of processes.  Raises UserError."""
        state.distribute(saved, self.backend.pieces(role), self.backend.optimizers[role], self._here(role))
        self.scales[role].load(saved.scaler)
        self.backend.refresh(role)

    # -- agreement -----------------------------------------------------------------------------------------------

    def same_everywhere(self, text: str) -> bool:
        """Whether every process has the same text."""
        return self.world == 1 or len(set(gather_object([text]))) == 1

    def from_main(self, value: T) -> T:
        """What the main process has, on all of them."""
        return value if self.world == 1 else broadcast_object_list([value])[0]

    def any_process(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any process; one vote for all."""
        if self.world == 1:
            return list(flags)
        return [vote > 0 for vote in self._vote(torch.tensor(flags, device=self.device)).tolist()]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over processes, key by key."""
        if self.world == 1 or not values:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.world).tolist(), strict=True))

    def close(self) -> None:
        self.state.destroy_process_group()
