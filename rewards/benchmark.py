"""``python -m rewards benchmark``: what each reward costs on random weights, as rows of a table.

What a backward pass needs of the forward one is counted tensor by tensor, so that it is exact, and no other work of the
process is in it.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rewards import REWARDS, Reward
from rewards.micro_batches import MicroBatched
from rewards.random_weights import write

REPEATS = 8
HEAD = (
    "| reward | shapes | layers | pictures a call | at a time | weights MB | score ms a picture | with gradient ms a picture "
    "| kept for the gradient MB a call |"
)


def table(given: argparse.Namespace) -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield HEAD
    yield "|" + "---|" * (HEAD.count("|") - 1)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    images = torch.rand(given.batch_size, 3, given.resolution, given.resolution, device=device)
    shapes = "published" if given.published else "small"
    for name in given.rewards:
        with tempfile.TemporaryDirectory() as folder:
            weights = write(name, Path(folder), small=not given.published, dtype=dtype)
            reward = REWARDS[name](weights, dtype=dtype, device=device)
        weights_mb = sum(p.numel() * p.element_size() for p in reward.model.parameters()) / 1e6  # type: ignore[attr-defined]
        for size in dict.fromkeys((given.batch_size, given.micro_batch)):
            costs = measure(MicroBatched(reward, size), reward.model, images)  # type: ignore[attr-defined]
            cells = [name, shapes, given.dtype, given.batch_size, size, f"{weights_mb:.0f}", *costs]
            yield "| " + " | ".join(map(str, cells)) + " |"
        del reward
        gc.collect()


def measure(reward: Reward, frozen: torch.nn.Module, images: torch.Tensor) -> list[str]:
    """Milliseconds a picture of a score, and with its gradient; megabytes kept in between."""
    prompts = [f"picture number {i}" for i in range(len(images))]
    score_s = seconds(lambda: forward(reward, images, prompts), images.device)
    gradient_s = seconds(lambda: backward(reward, images, prompts), images.device)
    kept = Kept(frozen)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda holder: holder.tensor):
        backward(reward, images, prompts)
    return [
        f"{1e3 * score_s / len(images):.1f}",
        f"{1e3 * gradient_s / len(images):.1f}",
        f"{kept.peak_bytes / 1e6:.1f}",
    ]


class Kept:
    """Counts the bytes that autograd keeps, at their peak; ``frozen`` weights, which are there anyway, are left out."""

    def __init__(self, frozen: torch.nn.Module) -> None:
        self.peak_bytes = 0
        self._bytes = 0
        self._frozen = {tensor.untyped_storage().data_ptr() for tensor in frozen.state_dict().values()}
        self._users: Counter[int] = Counter()  # storage -> how many saved tensors are views of it

    def keep(self, tensor: torch.Tensor) -> _Holder:
        """What autograd saves in a tensor's place; counts until it is let go."""
        holder, storage = _Holder(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._frozen:
            self._users[address] += 1
            self._bytes += size if self._users[address] == 1 else 0
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            weakref.finalize(holder, self._drop, address, size)
        return holder

    def _drop(self, address: int, size: int) -> None:
        self._users[address] -= 1
        self._bytes -= size if self._users[address] == 0 else 0


class _Holder:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@torch.no_grad()
def forward(reward: Reward, images: torch.Tensor, prompts: list[str]) -> None:
    reward(images, prompts)


def backward(reward: Reward, images: torch.Tensor, prompts: list[str]) -> None:
    leaf = images.detach().requires_grad_()
    reward(leaf, prompts).sum().backward()


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """The shortest of several calls, after one that is not counted."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
