"""The moving average of a role's weights, kept beside the optimizer's state: sharded, saved and moved as that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from train_t2i.engine.state import AVERAGE, Here, Piece, always_here


def tensors_of(pieces: Sequence[Piece]) -> list[Tensor]:
    """The tensors that pieces lie in, each once."""
    return list({id(piece.tensor): piece.tensor for piece in pieces}.values())


@torch.no_grad()
def average(pieces: Sequence[Piece], optimizer: Optimizer, decay: float, here: Here = always_here) -> None:
    """ema <- weights + decay (ema - weights); the weights themselves where there is none yet."""
    for tensor in tensors_of(pieces):
        state = optimizer.state[tensor]
        if not state:  # no update has been made; the optimizer makes its state in an empty one alone
            continue
        with here([tensor], average=True):
            if AVERAGE in state:
                state[AVERAGE].lerp_(tensor, 1 - decay)
            else:
                state[AVERAGE] = tensor.detach().clone()


@contextmanager
def averaged(pieces: Sequence[Piece], optimizer: Optimizer, refresh: Callable[[], None]) -> Iterator[None]:
    """The averages in the place of the weights, where there are any; the weights come back at the end.

    ``refresh`` has the network see what its tensors hold.
    """
    held = [(t, optimizer.state[t][AVERAGE]) for t in tensors_of(pieces) if AVERAGE in optimizer.state.get(t, {})]
    kept = [tensor.detach().clone() for tensor, _ in held]
    _put([(tensor, mean) for tensor, mean in held], refresh)
    try:
        yield
    finally:
        _put([(tensor, before) for (tensor, _), before in zip(held, kept, strict=True)], refresh)


@torch.no_grad()
def _put(values: Sequence[tuple[Tensor, Tensor]], refresh: Callable[[], None]) -> None:
    for tensor, value in values:
        tensor.copy_(value, non_blocking=True)  # it may wait on the host: offload.py says why nobody has to
    if values:
        refresh()
