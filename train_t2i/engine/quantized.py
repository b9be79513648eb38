"""bitsandbytes' 8-bit AdamW state in checkpoints.

A state is codes (one byte an element), scales (one a block of 256 elements as they lie in the optimizer's tensor) and a
table of 256 values.  Blocks of a sharded tensor begin elsewhere than those of the whole one, and may span two
parameters, so a checkpoint keeps segments: [start, numel, phase] of a parameter, the codes of its elements and the
scales of the blocks that they lie in.  Segments that are cut in the same way are loaded bit for bit; others become
numbers and are quantised anew.  A tensor of few elements (4096) is not quantised; its segments hold the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train_t2i.engine.state import Piece

BLOCK = 256
CODES = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}  # codes -> their scales and table
SCALES = ("absmax1", "absmax2")
TABLES = ("qmap1", "qmap2")
STATES = (*CODES, *SCALES)


def is_quantized(state: Mapping[str, Any]) -> bool:
    """Whether a state is of an 8-bit optimizer, also where its tensor is too small to be quantised."""
    return "state1" in state


def scales_of(scales: Tensor, piece: Piece) -> Tensor:
    """(blocks,): the scales of the blocks that a piece lies in."""
    return scales[piece.offset // BLOCK : -(-(piece.offset + piece.numel) // BLOCK)]


def load(
    state: dict[str, Any],
    tensor: Tensor,
    pieces: Sequence[Piece],
    saved: Mapping[str, Tensor],
    segments: Mapping[str, Sequence[Sequence[int]]],
) -> None:
    """Fill the state of one of the optimizer's tensors from the segments of the parameters that lie in it."""
    for key, (scales, table) in CODES.items():
        if _same_cut(state[key], pieces, key, saved, segments):
            for piece in pieces:
                piece.of(state[key]).copy_(saved[f"{piece.name}/{key}/{piece.start}"])
                if scales in state:
                    scales_of(state[scales], piece).copy_(saved[f"{piece.name}/{scales}/{piece.start}"])
            continue
        numbers = torch.zeros(tensor.numel())
        for piece in pieces:
            piece.of(numbers).copy_(_numbers(piece, key, saved, segments[piece.name]))
        if state[key].dtype == torch.uint8:
            codes, state[scales] = _quantise(numbers.to(tensor.device), state[table])
            state[key].copy_(codes.view_as(state[key]))
        else:
            state[key].copy_(numbers.view_as(state[key]))


def _same_cut(mine: Tensor, pieces: Sequence[Piece], key: str, saved: Mapping[str, Tensor], segments: Any) -> bool:
    for piece in pieces:
        if [piece.start, piece.numel, piece.offset % BLOCK] not in [list(s) for s in segments[piece.name]]:
            return False
        if saved[f"{piece.name}/{key}/{piece.start}"].dtype != mine.dtype:
            return False
    return True


def _numbers(piece: Piece, key: str, saved: Mapping[str, Tensor], segments: Sequence[Sequence[int]]) -> Tensor:
    """(numel,) fp32: a piece's state out of all segments of its parameter."""
    whole = torch.empty(sum(numel for _, numel, _ in segments))
    scales, _ = CODES[key]
    for start, numel, phase in segments:
        codes = saved[f"{piece.name}/{key}/{start}"]
        if codes.dtype == torch.uint8:
            block = (torch.arange(numel) + phase) // BLOCK
            whole[start : start + numel] = _table(key)[codes.int()] * saved[f"{piece.name}/{scales}/{start}"][block]
        else:
            whole[start : start + numel] = codes
    return whole[piece.start : piece.start + piece.numel]


def _table(key: str) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=key == "state1")


def _quantise(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_blockwise

    codes, state = quantize_blockwise(numbers, code=table, blocksize=BLOCK)
    return codes, state.absmax
