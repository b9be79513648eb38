"""A role's weights and optimizer state between the processes that hold them and the one that writes checkpoints.

The form in a checkpoint does not depend on the backend: whole tensors by parameter name.  Only 8-bit optimizer state,
whose scales belong to blocks of 256 elements as they lie in memory, is kept as the processes have it (quantized.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from train_t2i.engine import quantized
from train_t2i.engine.adam import create_state
from train_t2i.errors import UserError

CHUNK_BYTES = 256 << 20  # of one message to the process that writes
AVERAGE = "ema"  # key of the moving average of the weights among an optimizer's state (average.py)
# for some of an optimizer's tensors: while it lasts their state is on the device (offload.py)
Here = Callable[..., AbstractContextManager[None]]


def always_here(tensors: Sequence[Tensor], *, average: bool = False) -> AbstractContextManager[None]:
    """Of state that never leaves the device."""
    return nullcontext()


@dataclass(frozen=True)
class Piece:
    """What a process keeps of one parameter: its elements start .. start + numel - 1, in ``tensor`` from ``offset`` on."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    tensor: Tensor  # the optimizer's own
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """(numel,): this piece's part of a tensor that lies as ``tensor`` does; a view."""
        return whole.detach().view(-1)[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class RoleState:
    """A role as a checkpoint holds it: tensors by parameter name, and what is no tensor as JSON values."""

    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)  # the fp16 loss scale
    average: dict[str, Tensor] = field(default_factory=dict)  # the moving average of the model, where there is one


@dataclass(frozen=True)
class Message:
    """Where a tensor that one process sends belongs: which parameter, which state of it, which elements."""

    name: str
    key: str
    shape: tuple[int, ...]
    start: int
    numel: int  # elements of the parameter
    size: int  # elements of this tensor: fewer for the scales of 8-bit state
    dtype: torch.dtype
    phase: int  # how far the first element is into its block of 8-bit state

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


# -- from the processes into a checkpoint ----------------------------------------------------------------------------


def collect(pieces: Sequence[Piece], optimizer: Optimizer, rank: int, world: int) -> RoleState:
    """The whole state on process 0 (CPU tensors of its own), nothing on the others.  All processes call it.

    ``world`` is how many processes hold a part: 1 where each has everything.
    """
    if world == 1 and rank != 0:
        return RoleState()
    own = dict(_messages(pieces, optimizer))
    headers: list[Any] = [None] * world
    if world > 1:
        dist.gather_object(list(own), headers if rank == 0 else None)
    if rank != 0:
        device = pieces[0].tensor.device  # what waits on the host goes through it, as messages do
        for chunk in _chunks(list(own)):
            dist.send(torch.cat([_as_bytes(own[message].to(device)) for message in chunk]), dst=0)
        return RoleState()
    assembled = _Assembled()
    for message, tensor in own.items():
        assembled.put(message, tensor)
    for source in range(1, world):
        for message, tensor in _receive(headers[source], source, pieces[0].tensor.device):
            assembled.put(message, tensor)
    return assembled.state(pieces, optimizer)


def _messages(pieces: Sequence[Piece], optimizer: Optimizer) -> Iterator[tuple[Message, Tensor]]:
    for piece in pieces:
        if piece.numel == 0:
            continue
        state = optimizer.state.get(piece.tensor, {})
        phase = piece.offset % quantized.BLOCK if quantized.is_quantized(state) else 0
        yield _message(piece, "", piece.of(piece.tensor), phase)
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or key in quantized.TABLES:
                continue
            part = quantized.scales_of(value, piece) if key in quantized.SCALES else piece.of(value)
            yield _message(piece, key, part, phase)


def _message(piece: Piece, key: str, tensor: Tensor, phase: int) -> tuple[Message, Tensor]:
    place = (piece.name, key, piece.shape, piece.start, piece.numel)
    return Message(*place, tensor.numel(), tensor.dtype, phase), tensor


def _chunks(messages: Sequence[Message]) -> Iterator[list[Message]]:
    chunk: list[Message] = []
    size = 0
    for message in messages:
        if chunk and size + message.bytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += message.bytes
    if chunk:
        yield chunk


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _receive(messages: Sequence[Message], source: int, device: torch.device) -> Iterator[tuple[Message, Tensor]]:
    for chunk in _chunks(messages):
        buffer = torch.empty(sum(message.bytes for message in chunk), dtype=torch.uint8, device=device)
        dist.recv(buffer, src=source)
        parts = buffer.cpu().split([message.bytes for message in chunk])
        for message, part in zip(chunk, parts, strict=True):
            yield message, part.clone().view(message.dtype)  # a part may begin at any byte


class _Assembled:
    """Whole tensors out of parts; 8-bit state stays in its parts."""

    def __init__(self) -> None:
        self.model: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.segments: dict[str, list[list[int]]] = {}

    def put(self, message: Message, part: Tensor) -> None:
        if message.key in quantized.STATES:
            self._put_segment(message, part)
            return
        target, label = {"": (self.model, message.name), AVERAGE: (self.average, message.name)}.get(
            message.key, (self.optimizer, f"{message.name}/{message.key}")
        )
        if label not in target:
            target[label] = torch.empty(message.shape, dtype=message.dtype)
        target[label].view(-1)[message.start : message.start + message.numel] = part.cpu()

    def _put_segment(self, message: Message, part: Tensor) -> None:
        place = [message.start, message.numel, message.phase]
        segments = self.segments.setdefault(message.name, [])
        if place not in segments:
            segments.append(place)
        self.optimizer[f"{message.name}/{message.key}/{message.start}"] = part.cpu().clone()

    def state(self, pieces: Sequence[Piece], optimizer: Optimizer) -> RoleState:
        state = optimizer.state.get(pieces[0].tensor, {})
        step = float(state["step"]) if state else 0.0
        values: dict[str, Any] = {"optimizer": type(optimizer).__name__, "step": step}
        if self.segments:
            values["segments"] = self.segments
        return RoleState(self.model, self.optimizer, values, average=self.average)


# -- from a checkpoint into the processes ----------------------------------------------------------------------------


def distribute(saved: RoleState, pieces: Sequence[Piece], optimizer: Optimizer, here: Here = always_here) -> None:
    """Put a checkpoint's state into this process's pieces, on whatever backend and number of processes it was made.

    A tensor's at a time, so that no more than one is on the device of those that wait elsewhere.
    Raises UserError for the state of another optimizer.
    """
    if (theirs := saved.values["optimizer"]) != (mine := type(optimizer).__name__):
        raise UserError(
            f"the checkpoint holds the state of {theirs}, this run trains with {mine}", "use the same optimizer flags"
        )
    with torch.no_grad():
        for piece in pieces:
            piece.of(piece.tensor).copy_(_part(saved.model[piece.name], piece))
    if saved.values["step"] == 0:
        return
    by_tensor: dict[Tensor, list[Piece]] = {}
    for piece in pieces:
        by_tensor.setdefault(piece.tensor, []).append(piece)
    for tensor, on_it in by_tensor.items():
        with here([tensor]), here([tensor], average=True):
            if not optimizer.state.get(tensor):
                create_state(optimizer, [tensor])
            state = optimizer.state[tensor]
            _load_average(state, tensor, on_it, saved.average)
            if "segments" in saved.values or quantized.is_quantized(state):
                quantized.load(state, tensor, on_it, saved.optimizer, saved.values.get("segments", {}))
            else:
                _load_whole(state, on_it, saved.optimizer)
            _set_step(state, saved.values["step"])


def _load_average(state: dict[str, Any], tensor: Tensor, pieces: Sequence[Piece], saved: Mapping[str, Tensor]) -> None:
    """No optimizer makes one: it is there iff the checkpoint has it."""
    state.pop(AVERAGE, None)
    if saved:
        state[AVERAGE] = torch.zeros_like(tensor)
        for piece in pieces:
            piece.of(state[AVERAGE]).copy_(_part(saved[piece.name], piece))


def _part(whole: Tensor, piece: Piece) -> Tensor:
    return whole.view(-1)[piece.start : piece.start + piece.numel]


def _load_whole(state: Mapping[str, Any], pieces: Sequence[Piece], saved: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or key == AVERAGE:
            continue
        for piece in pieces:
            piece.of(value).copy_(_part(saved[f"{piece.name}/{key}"], piece))


def _set_step(state: dict[str, Any], step: float) -> None:
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = type(state["step"])(step)
