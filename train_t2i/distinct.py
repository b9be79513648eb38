"""How many of very many hashes differ, with the memory of a few."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

HASHES_AT_ONCE = 1 << 20


def distinct(file: BinaryIO, count: int) -> int:
    """How many of a file's ``count`` hashes (uint64) differ; a share of them, by their highest bits, in memory at a time."""
    bits = max(0, (count - 1) // HASHES_AT_ONCE).bit_length()
    total = 0
    for part in range(1 << bits):
        hashes = np.sort(_share(file, count, part, bits))
        total += min(1, len(hashes)) + int(np.count_nonzero(hashes[1:] != hashes[:-1]))
    return total


def _share(file: BinaryIO, count: int, part: int, bits: int) -> np.ndarray:
    """Those hashes whose highest ``bits`` bits are ``part``."""
    file.seek(0)
    found = []
    for first in range(0, count, HASHES_AT_ONCE):
        hashes = np.fromfile(file, np.uint64, min(HASHES_AT_ONCE, count - first))
        found.append(hashes[hashes >> np.uint64(64 - bits) == part] if bits else hashes)
    return np.concatenate(found)
