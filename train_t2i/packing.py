"""One prompt's embedding <-> bytes.

    native    the encoder's own numbers, bit for bit
    bf16      rounded to bfloat16
    fp8       float8_e4m3fn times one fp32 scale a token: an error of at most max(|x| / 16, scale / 1024), where scale is
              the token's largest |x| / 448

The bytes are compressed without loss.  A token most of whose numbers are near those of the token before (within an octave
or so) is written as the difference of the bit patterns, as integers, zigzag, so that a small step of either sign is a small
number: T5's outputs at neighbouring padding differ in their last bits, yet no two are equal.  The bytes of equal weight then
stand together, and zstd finds their zeros.
Shapes: tokens (L, D); pooled (P,).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

STORES = ("native", "bf16", "fp8")
ENCODER_DTYPES = ("float32", "float16", "bfloat16")
MAX_WIDTH = 1 << 20  # of a token or pooled; those of real encoders have five digits at most
FP8_MAX = 448.0
LEVEL = 1  # of zstd: higher ones gain nothing here, and are slower
BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@dataclass(frozen=True)
class Layout:
    """What all embeddings of a cache have in common."""

    store: str  # STORES
    dtype: str  # the encoder's, and that of what is read: ENCODER_DTYPES
    width: int  # D
    pooled: int  # P; 0: none

    @property
    def sound(self) -> bool:
        """Whether it can be one that was written."""
        widths = (self.width, self.pooled)
        whole = all(isinstance(width, int) and 0 <= width <= MAX_WIDTH for width in widths) and self.width > 0
        return whole and self.store in STORES and self.dtype in ENCODER_DTYPES

    @property
    def read_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def token_dtype(self) -> torch.dtype:
        return {"native": self.read_dtype, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[self.store]

    @property
    def pooled_dtype(self) -> torch.dtype:
        return self.read_dtype if self.store == "native" else torch.bfloat16

    def raw_bytes(self, length: int) -> int:
        """Of an embedding of so many tokens, before compression."""
        scales = 4 * length if self.store == "fp8" else 0
        return (
            length + scales + self.pooled * self.pooled_dtype.itemsize + length * self.width * self.token_dtype.itemsize
        )


@cache
def _codec() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=LEVEL)


def pack(layout: Layout, tokens: Tensor, pooled: Tensor | None) -> bytes:
    """(L, D) and (P,) on the CPU -> bytes."""
    parts: list[bytes] = []
    if layout.store == "fp8":
        scales = scales_of(tokens)
        parts.append(scales.numpy().tobytes())
        tokens = tokens.float() / scales[:, None]
    if pooled is not None:
        parts.append(_bits(pooled.to(layout.pooled_dtype)).tobytes())
    bits = _bits(tokens.to(layout.token_dtype))
    near, written = _near_rows(bits, torch.finfo(layout.token_dtype).eps)
    parts += [near.tobytes(), _planes(written)]
    return _codec().compress(b"".join(parts), asbytes=True)


def unpack(layout: Layout, blob: bytes, length: int) -> tuple[Tensor, Tensor | None]:
    """The reverse: tokens (L, D) and pooled (P,) in the encoder's dtype.

    Raises OSError or ValueError for bytes of another layout or length.
    """
    data = np.frombuffer(_codec().decompress(blob, layout.raw_bytes(length), asbytes=True), np.uint8)
    scales, pooled, at = None, None, 0
    if layout.store == "fp8":
        scales, at = torch.from_numpy(data[: 4 * length].view(np.float32).copy()), 4 * length
    if layout.pooled:
        end = at + layout.pooled * layout.pooled_dtype.itemsize
        pooled, at = _values(data[at:end].copy(), layout.pooled_dtype).to(layout.read_dtype), end
    near, planes = data[at : at + length], data[at + length :]
    written = _joined(planes, layout.token_dtype.itemsize).reshape(length, layout.width)
    tokens = _values(_summed(written, near), layout.token_dtype)
    if scales is not None:
        tokens = tokens.float() * scales[:, None]
    return tokens.to(layout.read_dtype), pooled


def scales_of(tokens: Tensor) -> Tensor:
    """(L,) fp32: what a token's numbers are divided by, so that the largest is float8's largest."""
    largest = tokens.float().abs().amax(1)
    return torch.where(largest > 0, largest / FP8_MAX, 1.0).clamp_min(torch.finfo(torch.float32).tiny)


def _bits(values: Tensor) -> np.ndarray:
    """Numbers as unsigned integers of the same bits."""
    theirs, ours = BITS[values.element_size()]
    return values.contiguous().view(theirs).numpy().view(ours)


def _values(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    theirs, _ = BITS[dtype.itemsize]
    return torch.from_numpy(bits.view(np.dtype(str(theirs).removeprefix("torch.")))).view(dtype)


def _near_rows(bits: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(L,) 1 where a row is near the one before, and (L, D) with the zigzag differences there: 0, -1, 1, -2 as 0, 1, 2, 3."""
    steps = (bits[1:] - bits[:-1]).view(f"i{bits.itemsize}")
    zigzag = ((steps << 1) ^ (steps >> (8 * bits.itemsize - 1))).view(bits.dtype)
    near = np.zeros(len(bits), np.uint8)
    near[1:] = 2 * np.count_nonzero(zigzag < 2 / eps, axis=1) > bits.shape[1]  # an octave has 1 / eps numbers
    written = bits.copy()
    written[near == 1] = zigzag[near[1:] == 1]
    return near, written


def _summed(written: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The bit patterns again, in place."""
    rows = np.flatnonzero(near)
    zigzag = written[rows]
    written[rows] = (zigzag >> 1) ^ (np.zeros((), zigzag.dtype) - (zigzag & 1))
    for row in rows.tolist():
        np.add(written[row], written[row - 1], out=written[row])
    return written


def _planes(bits: np.ndarray) -> bytes:
    """All lowest bytes, then all of the next, ..."""
    return bits.reshape(-1).view(np.uint8).reshape(-1, bits.itemsize).T.tobytes()


def _joined(planes: np.ndarray, itemsize: int) -> np.ndarray:
    return planes.reshape(itemsize, -1).T.copy().reshape(-1).view(BITS[itemsize][1])
