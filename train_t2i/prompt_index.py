"""Which prompts are the same: a number for every different text, and a table to find it by its hash.

    samples   U32 (N,) row of the data -> entry; entries are numbered in the order in which their texts first appear
    high, low U64 (U,) the halves of the texts' xxh3_128, in ascending order
    entries   U32 (U,) the entries of those

Memory does not grow with the prompts: all of it is mapped, and sorted a share at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from train_t2i.mapped import Scratch, release

ROWS_AT_ONCE = 1 << 14
SHARE = 1 << 20  # rows that are sorted at once
MASK_64 = (1 << 64) - 1


def halves(text: str) -> tuple[int, int]:
    """The two 64-bit halves of a text's hash."""
    digest = xxhash.xxh3_128_intdigest(text.encode())
    return digest >> 64, digest & MASK_64


@dataclass(frozen=True)
class Index:
    """The tables above, in temporary files."""

    samples: np.ndarray
    high: np.ndarray
    low: np.ndarray
    entries: np.ndarray
    digest: str  # of all prompts in their order
    scratch: tuple[Scratch, ...]  # what the arrays lie in

    @property
    def unique(self) -> int:
        return len(self.entries)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"high": self.high, "low": self.low, "samples": self.samples, "entries": self.entries}

    def first_rows(self, size: int) -> Iterator[np.ndarray]:
        """The rows where the entries 0 ... size - 1 first appear, then those of the next ``size``, and so on."""
        first, found = 0, np.zeros(0, np.int64)
        for begin in range(0, len(self.samples), ROWS_AT_ONCE):
            values, places = np.unique(self.samples[begin : begin + ROWS_AT_ONCE], return_index=True)
            found = np.concatenate([found, begin + places[values >= first + len(found)]])
            while len(found) >= size:
                yield found[:size]
                first, found = first + size, found[size:]
            release(self.scratch)
        if len(found):
            yield found


def build(prompts: Sequence[str], rows: range) -> Index:
    """Number the texts of ``rows``.  Raises OSError where the temporary folder has no room."""
    count = len(rows)
    if count >= 2**32:
        raise ValueError("more rows than 32 bits can number")
    parts = [Scratch(dtype, count) for dtype in ("<u8", "<u8", "<u4", "<u8", "<u8", "<u4")]
    all_high, all_low, samples, high, low, entries = (part.array for part in parts)
    digest = _hash_all(prompts, rows, all_high, all_low)
    unique = 0
    bits = max(0, (count - 1) // SHARE).bit_length()
    for share in range(1 << bits):
        unique += _sort_share(
            share, bits, (all_high, all_low, samples), (high[unique:], low[unique:], entries[unique:])
        )
        release(parts)
    _number(samples)
    for first in range(0, unique, SHARE):  # so far the row where the text first appears
        entries[first : min(first + SHARE, unique)] = samples[entries[first : min(first + SHARE, unique)]]
    release(parts)
    return Index(samples, high[:unique], low[:unique], entries[:unique], digest, tuple(parts[2:]))


def _hash_all(prompts: Sequence[str], rows: range, high: np.ndarray, low: np.ndarray) -> str:
    whole = xxhash.xxh3_128()
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        found = [halves(prompts[row]) for row in rows[begin : begin + ROWS_AT_ONCE]]
        both = np.array(found, np.uint64)
        high[begin : begin + len(both)], low[begin : begin + len(both)] = both[:, 0], both[:, 1]
        whole.update(both.tobytes())
    return whole.hexdigest()


def _sort_share(share: int, bits: int, rows: Sequence[np.ndarray], out: Sequence[np.ndarray]) -> int:
    """Sort the hashes whose highest ``bits`` bits are ``share`` into ``out``, each with the row where it first appears, which
    all of its rows are told as well; how many there are."""
    all_high, all_low, samples = rows
    where = np.concatenate(
        [
            begin + np.flatnonzero(all_high[begin : begin + SHARE] >> np.uint64(64 - bits) == share)
            if bits
            else np.arange(begin, min(begin + SHARE, len(all_high)))
            for begin in range(0, len(all_high), SHARE)
        ]
    )
    order = where[np.lexsort((all_low[where], all_high[where]))]  # stable: rows of one text stay in their order
    high, low = all_high[order], all_low[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    firsts = order[begins]
    samples[order] = firsts[np.cumsum(begins) - 1]
    for target, values in zip(out, (high[begins], low[begins], firsts), strict=True):
        target[: len(firsts)] = values
    return len(firsts)


def _number(samples: np.ndarray) -> None:
    """Row of first appearance -> entry, in place, from front to back: what an earlier row became is known by then."""
    entry = 0
    for begin in range(0, len(samples), SHARE):
        part = samples[begin : begin + SHARE]
        new = part == np.arange(begin, begin + len(part))
        again, at = np.flatnonzero(~new), part[~new].copy()
        part[new] = np.arange(entry, entry + int(new.sum()))
        entry += int(new.sum())
        part[again] = samples[at]
