"""Everything distributed, and everything that touches an optimizer: the only importer of accelerate.

One optimizer a trained role.  Gradients of a role are averaged over processes as one flat vector before clipping, which
is exact whatever the layout; a non-finite update is agreed on by all processes and skipped as a whole.
"""

from __future__ import annotations

import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from train_t2i.errors import UserError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class AdamSettings:
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    use_8bit: bool


@dataclass(frozen=True)
class StepReport:
    """What an update did: the gradient norm before clipping, and whether it was skipped as non-finite."""

    grad_norm: float
    skipped: bool


class Engine:
    """Device, processes, precision, and the optimizers of the trained roles."""

    def __init__(self, mixed_precision: str, max_grad_norm: float, wait_s: float = 1800) -> None:
        """``wait_s``: how long a collective waits for the other processes before it raises."""
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise UserError("this launch asks for FSDP or DeepSpeed", "launch with plain data parallelism")
        self.state = PartialState(cpu=_on_cpu(), timeout=timedelta(seconds=wait_s))
        self.device = self.state.device
        self.rank, self.world = self.state.process_index, self.state.num_processes
        _assert_world(self.world)
        self.dtype = DTYPES[mixed_precision]
        self.max_grad_norm = max_grad_norm
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self.scalers: dict[str, torch.amp.GradScaler] = {}
        self._bad: dict[str, Tensor] = {}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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

    def prepare(self, role: str, parameters: list[nn.Parameter], adam: AdamSettings) -> None:
        """Make the role's optimizer."""
        self.parameters[role] = parameters
        self.optimizers[role] = _adam(parameters, adam)
        self.scalers[role] = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._bad[role] = torch.zeros((), dtype=torch.bool, device=self.device)

    def set_lr(self, role: str, learning_rate: float) -> None:
        for group in self.optimizers[role].param_groups:
            group["lr"] = learning_rate

    def backward(self, role: str, loss: Tensor) -> None:
        """Accumulate gradients; never rescales but for the fp16 loss scale."""
        self._bad[role] |= ~torch.isfinite(loss.detach())
        self.scalers[role].scale(loss).backward()

    def step(self, role: str) -> StepReport:
        """Average over processes, agree on finiteness, clip, step, zero."""
        optimizer, parameters, scaler = self.optimizers[role], self.parameters[role], self.scalers[role]
        scaler.unscale_(optimizer)
        self._average_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        bad = self._agree(self._bad[role] | ~torch.isfinite(norm))
        self._bad[role].zero_()
        if not bad:
            if self.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            optimizer.step()  # not scaler.step: finiteness was agreed on above, over all processes
        self._update_scale(role, bad)
        optimizer.zero_grad(set_to_none=True)
        return StepReport(float(norm), bad)

    def _update_scale(self, role: str, bad: bool) -> None:
        """Torch's own rule, but after the vote: one process's overflow lowers the loss scale on all."""
        scaler = self.scalers[role]
        if not scaler.is_enabled():
            return
        if not bad:
            scaler.update()
            return
        state = scaler.state_dict()
        lowered = state["scale"] * state["backoff_factor"]
        scaler.update(lowered)
        scaler.load_state_dict(state | {"scale": lowered, "_growth_tracker": 0})

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.world == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, gradient in zip(parameters, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            parameter.grad = gradient

    def _agree(self, flag: Tensor) -> bool:
        """True on all processes if it is true on one."""
        if self.world > 1:
            number = flag.float()
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            flag = number > 0
        return bool(flag)

    def same_everywhere(self, text: str) -> bool:
        """Whether every process has the same text."""
        return self.world == 1 or len(set(gather_object([text]))) == 1

    def any_process(self, flag: bool) -> bool:
        return self._agree(torch.tensor(flag, device=self.device))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over processes, key by key."""
        if self.world == 1 or not values:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.world).tolist(), strict=True))

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    def scaler_state(self, role: str) -> dict[str, Any]:
        return self.scalers[role].state_dict()

    def load_scaler_state(self, role: str, state: dict[str, Any]) -> None:
        """Nothing to load where the checkpoint was not made in fp16."""
        if self.scalers[role].is_enabled() and state:
            self.scalers[role].load_state_dict(state)

    def close(self) -> None:
        self.state.destroy_process_group()


def _adam(parameters: list[nn.Parameter], adam: AdamSettings) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": adam.learning_rate, "betas": adam.betas, "eps": adam.epsilon, "weight_decay": adam.weight_decay,
    }  # fmt: skip
    if not adam.use_8bit:
        return torch.optim.AdamW(parameters, fused=True, **options)  # one pass over memory; on CPUs too
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--use-8bit-adam needs bitsandbytes", "uv sync --extra bitsandbytes") from None
    return AdamW8bit(parameters, **options)


def _on_cpu() -> bool:
    """accelerate has to be told: else processes that torchrun starts without an accelerator each believe to be alone."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return asked or not torch.accelerator.is_available()


def _assert_world(world: int) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process and says nothing: refuse instead.

    Its launcher sets no WORLD_SIZE then, but it does set a meeting point, which one process would not need.
    """
    told = os.environ.get("WORLD_SIZE")
    if told is not None and int(told) != world:
        raise UserError(f"the launcher asked for {told} processes but {world} started", "launch with torchrun")
    if told is None and "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and starts one (it does so without GPUs)",
            "launch with torchrun --nproc-per-node N -m train_t2i train ...",
        )
