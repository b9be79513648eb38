"""The order of samples, which can start anywhere: pure functions of a seed and a sample's index, nothing is kept."""

import bisect
import hashlib
import math
import struct
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

NUM_ROUNDS = 8
MASK_64 = (1 << 64) - 1


class Order:
    """A permutation of ``count`` rows for every epoch: a pure function of (seed, epoch, position), nothing is kept.

    A Feistel network over Z_a x Z_b with a * b >= count and a, b close to its root (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002): every round adds a hash of one half to the other, which can be undone, so the network
    is a permutation of a * b; positions that it sends outside ``count`` are sent on until they come back in.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("an order needs at least one row")
        self.count, self.seed = count, seed
        self.rows = math.isqrt(count - 1) + 1
        self.columns = -(-count // self.rows)

    def index_at(self, sample_index: int) -> int:
        """The row shown as sample ``sample_index`` (0, 1, ...), whatever was asked before."""
        epoch, place = divmod(sample_index, self.count)
        keys = _round_keys(self.seed, epoch)
        while True:  # 1.0 turns on average for large counts, at most 4 / 3 for small ones
            place = self._network(place, keys)
            if place < self.count:
                return place

    def _network(self, place: int, keys: tuple[int, ...]) -> int:
        left, right = divmod(place, self.columns)
        for i in range(0, NUM_ROUNDS, 2):
            left = (left + _mixed(right ^ keys[i])) % self.rows
            right = (right + _mixed(left ^ keys[i + 1])) % self.columns
        return left * self.columns + right


@lru_cache(maxsize=4)  # a batch may straddle the end of an epoch
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * NUM_ROUNDS).digest()
    return struct.unpack(f"<{NUM_ROUNDS}Q", digest)


def _mixed(x: int) -> int:
    """64 bits of which each depends on every bit of ``x`` (the finaliser of splitmix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK_64
    return x ^ x >> 31


class Sequenced(Protocol):
    """Which row is shown as which sample."""

    def index_at(self, sample_index: int) -> int: ...


class BucketOrder:
    """Rows in chunks of ``chunk_size`` that share a bucket; no row is left out or shown more often than its neighbours.

    The rows of a bucket are an endless stream of permutations, cut into chunks: what an epoch leaves of it goes on in the
    next.  After e epochs a bucket of n rows has shown floor(e n / chunk_size) chunks; the chunks of an epoch stand in a
    permutation of their own.  A pure function of (seed, sample index), as ``Order``.
    """

    def __init__(self, buckets: Sequence[int], chunk_size: int, seed: int) -> None:
        """``buckets``: of each row, from 0 up, none of them empty."""
        self.chunk_size, self.seed = chunk_size, seed
        of_row = np.asarray(buckets, dtype=np.int64)
        self.counts = np.bincount(of_row)
        self.rows = np.split(np.argsort(of_row, kind="stable"), np.cumsum(self.counts)[:-1])
        self.inside = [Order(len(rows), seed) for rows in self.rows]
        self._last = (0, self._found(0))  # neighbours ask for the same chunk

    def index_at(self, sample_index: int) -> int:
        chunk, position = divmod(sample_index, self.chunk_size)
        if self._last[0] != chunk:
            self._last = (chunk, self._found(chunk))
        bucket, of_bucket = self._last[1]
        return int(self.rows[bucket][self.inside[bucket].index_at(of_bucket * self.chunk_size + position)])

    def _shown(self, epochs: int) -> np.ndarray:
        """Chunks of each bucket in the first ``epochs``."""
        return epochs * self.counts // self.chunk_size

    def _found(self, chunk: int) -> tuple[int, int]:
        """(bucket, which of its chunks) of a chunk of the whole order."""
        # of e epochs there are more than sum_b (e n_b / G - 1) chunks: where the search ends
        latest = (chunk + len(self.rows)) * self.chunk_size // int(self.counts.sum()) + 1
        epoch = bisect.bisect_right(range(latest + 1), chunk, key=lambda e: int(self._shown(e).sum())) - 1
        before = self._shown(epoch)
        ends = np.cumsum(self._shown(epoch + 1) - before)
        count = int(ends[-1])
        place = Order(count, self.seed).index_at(epoch * count + chunk - int(before.sum()))
        bucket = int(np.searchsorted(ends, place, side="right"))
        return bucket, int(before[bucket]) + place - (int(ends[bucket - 1]) if bucket else 0)


def order_of(keys: Sequence[Hashable], chunk_size: int, seed: int) -> Sequenced:
    """Rows of equal keys in chunks of their own; where all keys are equal, the plain order."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) < 2:
        return Order(len(keys), seed)
    return BucketOrder([numbers[key] for key in keys], chunk_size, seed)


def batch_indices(
    samples_seen: int, batch_size: int, rank: int = 0, world: int = 1, micro: int = 0, accumulate: int = 1
) -> list[int]:
    """Global sample indices of one process's micro-batch.

    A tick shows samples_seen ... + accumulate * world * batch_size - 1, whatever way they are split.
    """
    if not (0 <= rank < world and 0 <= micro < accumulate):
        raise ValueError(f"rank {rank} of {world}, micro-batch {micro} of {accumulate}")
    first = samples_seen + (micro * world + rank) * batch_size
    return list(range(first, first + batch_size))
