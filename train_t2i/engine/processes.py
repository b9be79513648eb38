"""Which processes there are, and how the trained state lies on them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from train_t2i.errors import UserError

SHARDED = ("fsdp2", "zero2", "zero3")


def start_processes(timeout: timedelta) -> PartialState:
    """This process among those of the launch.  Raises UserError where the launcher started others than it was asked for."""
    # accelerate would start DeepSpeed's communication by itself; ours starts with plain torch on every backend
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        state = PartialState(cpu=_on_cpu(), timeout=timeout)
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked
    _assert_world(state.num_processes)
    return state


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
