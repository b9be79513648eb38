"""``--offload-optimizer``: an optimizer's state waits in the host's memory, and is on the device only where it is used.

Libraries do another thing: bitsandbytes' paged optimizers are its own AdamW alone, and leave it to the driver when to move;
FSDP2's and DeepSpeed's offloading, and torchao's, step on the host with optimizers of theirs or move the weights too.  Here
bits are moved and the optimizer does not know, so that training is equal bit for bit.

Nobody waits for a copy.  All of them are between the device and pinned memory, on the stream that computes, so each comes after
what it needs: a step after its state has come, the next one's coming after this one's leaving, and whatever is put where
a state was on the device after it has left.  The host reads none of it, but for a checkpoint, which waits first (``settle``).
Only a first step waits once, for the host's memory to be pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from train_t2i.engine.quantized import TABLES
from train_t2i.engine.state import AVERAGE

SLICE = 1 << 26  # elements of parameters whose state is on the device at once in a step: 0.5 GiB of fp32 moments
SMALLEST, LARGEST = 1 << 24, 1 << 29  # bytes of a block of pinned memory, where no tensor is larger
ALIGNED = 512  # bytes


def is_apart(device: torch.device) -> bool:
    """Whether the memory of a device is not the host's."""
    return device.type != "cpu"


class HostMemory:
    """Memory of the host, cut into tensors for good.

    In blocks, each as large as all before: torch rounds what it pins up to a power of two, and would do so for each tensor.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.blocks: list[Tensor] = []
        self.used: list[int] = []

    def like(self, tensor: Tensor) -> Tensor:
        """One of the same shape and dtype."""
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        rooms = (i for i, block in enumerate(self.blocks) if self.used[i] + size <= block.numel())
        if (place := next(rooms, None)) is None:
            place = len(self.blocks)
            room = max(size, min(LARGEST, max(SMALLEST, sum(block.numel() for block in self.blocks))))
            self.blocks.append(torch.empty(room, dtype=torch.uint8, pin_memory=self.pinned))
            self.used.append(0)
        start = self.used[place]
        self.used[place] += size
        return self.blocks[place][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class Offloaded:
    """The state of one optimizer.  Outside ``here`` all of it is on the host, but for numbers () and 8-bit state's tables."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.memory = HostMemory(pinned=is_apart(device))
        self._there: dict[Tensor, dict[str, Tensor]] = {}  # where each part of a state waits

    @contextmanager
    def here(self, tensors: Sequence[Tensor], *, average: bool = False) -> Iterator[None]:
        """What a step needs of these parameters' state (``average``: their moving average alone) is on the device meanwhile."""
        for state, key, _ in self._parts(tensors, average):
            state[key] = torch.empty_like(state[key], device=self.device).copy_(state[key], non_blocking=True)
        try:
            yield
        finally:
            for state, key, there in self._parts(tensors, average):
                if key not in there:
                    there[key] = self.memory.like(state[key])
                state[key] = there[key].copy_(state[key], non_blocking=True)

    def _parts(
        self, tensors: Iterable[Tensor], average: bool
    ) -> Iterator[tuple[dict[str, Any], str, dict[str, Tensor]]]:
        for tensor in tensors:
            state = self.optimizer.state.get(tensor, {})
            for key in list(state):
                moves = isinstance(state[key], Tensor) and state[key].ndim > 0 and key not in TABLES
                if moves and (key == AVERAGE) is average:
                    yield state, key, self._there.setdefault(tensor, {})

    def step(self) -> None:
        """The optimizer's own, a slice of the parameters at a time."""
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        try:
            for part in slices([tensor for tensors in whole for tensor in tensors]):
                chosen = {id(tensor) for tensor in part}
                for group, tensors in zip(groups, whole, strict=True):
                    group["params"] = [tensor for tensor in tensors if id(tensor) in chosen]
                with self.here(part):
                    self.optimizer.step()
        finally:
            for group, tensors in zip(groups, whole, strict=True):
                group["params"] = tensors

    def settle(self) -> None:
        """Until what has left is on the host, which may read it then."""
        if is_apart(self.device):
            torch.accelerator.synchronize(self.device)


def slices(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of no more than SLICE elements together, or one that has more."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > SLICE:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    if part:
        yield part
