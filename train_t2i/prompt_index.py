"""Which prompts are the same: a number for every different text, and a table to find it by its hash.

    samples   U32 (N,) row of the data -> entry; entries are numbered in the order in which their texts first appear
    high, low U64 (U,) the halves of the texts' xxh3_128, in ascending order
    entries   U32 (U,) the entries of those

Memory does not grow with the prompts: all of it is mapped, and sorted a share at a time.  The file says of what prompts it is
and what the digest of its tables is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from train_t2i.mapped import Mapped, Scratch, release, write_arrays
from train_t2i.storage import Damaged

ROWS_AT_ONCE = 1 << 14
SHARE = 1 << 20  # rows that are sorted at once
MASK_64 = (1 << 64) - 1
TABLES: dict[str, np.dtype[Any]] = {
    "high": np.dtype("<u8"), "low": np.dtype("<u8"), "samples": np.dtype("<u4"), "entries": np.dtype("<u4"),
}  # fmt: skip
PROMPTS_DIGEST, TABLES_DIGEST = "digest", "tables"  # in the file's metadata


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

    def write(self, path: Path) -> None:
        """Raises OSError."""
        tables = {name: getattr(self, name) for name in TABLES}
        write_arrays(path, tables, {PROMPTS_DIGEST: self.digest, TABLES_DIGEST: digest_of(tables)})

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


def digest_of(tables: Mapping[str, np.ndarray]) -> str:
    """xxh3_128 of all their bytes."""
    whole = xxhash.xxh3_128()
    for name in TABLES:
        for first in range(0, len(tables[name]), SHARE):
            whole.update(tables[name][first : first + SHARE].tobytes())
    return whole.hexdigest()


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


class StoredIndex:
    """The tables in a file, mapped.  Raises Damaged for one that is of other prompts or not whole, also when it is used."""

    def __init__(self, path: Path, digest: str, unique: int) -> None:
        """``digest``: of the prompts; ``unique``: different ones."""
        self.path, self.unique, self._file = path, unique, Mapped(path)
        if self._file.metadata.get(PROMPTS_DIGEST) != digest:
            raise Damaged(f"{path}: is of other prompts")
        counts = {name: None if name == "samples" else unique for name in TABLES}
        self._file.require({name: (dtype, counts[name]) for name, dtype in TABLES.items()})
        self._tables = self._file.arrays

    def __len__(self) -> int:
        """Rows of the data."""
        return len(self._tables["samples"])

    def entry_of(self, row: int) -> int:
        """The entry of a row of the data, once the tables were checked: nothing tells one row's entry from another's."""
        self.check()
        return self._sound(int(self._tables["samples"][row]))

    def find(self, text: str) -> int | None:
        """The entry of a text.  A damaged table may lead to another's, which its shard can tell, or to none."""
        high, low = halves(text)
        at = int(np.searchsorted(self._tables["high"], np.uint64(high)))
        while at < self.unique and int(self._tables["high"][at]) == high:
            if int(self._tables["low"][at]) == low:
                return self._sound(int(self._tables["entries"][at]))
            at += 1
        return None

    def _sound(self, entry: int) -> int:
        if entry >= self.unique:
            raise Damaged(f"{self.path}: leads to entry {entry} of {self.unique}")
        return entry

    def check(self) -> None:
        """Read all of it, the first time, and compare it with its digest, which files of an older version have none of."""
        if self._file.metadata.get(TABLES_DIGEST) not in (None, self._digest):
            raise Damaged(f"{self.path}: is damaged")

    @cached_property
    def _digest(self) -> str:
        found = digest_of(self._tables)
        self.release()
        return found

    def release(self) -> None:
        self._file.release()
