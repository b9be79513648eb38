"""Rows with images as training takes them: targets at the run's size or at that of their bucket, sources at theirs.

Shapes: images (3, H, W) fp32 in [0, 1]; sources (3, h, w) uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from train_t2i.data import Order, Sequenced, order_of
from train_t2i.pictures import fit_image, source_image
from train_t2i.rows import Row
from train_t2i.sizes import Size, bucket_sizes, nearest, side_divisor, sized

Item = dict[str, Any]
ENCODED_AT_ONCE = 64


@torch.no_grad()
def encoded(rows: Sequence[Row], size_px: Size, encode: Callable[[Tensor], Tensor], told: str = "") -> Tensor:
    """(N, D) fp32 on the CPU: what ``encode`` makes of the targets at a size; ``told`` names a progress bar."""
    features = []
    for first in tqdm(range(0, len(rows), ENCODED_AT_ONCE), unit="batch", desc=told, disable=not told):
        images = [fit_image(row.target, row.place, *size_px) for row in rows[first : first + ENCODED_AT_ONCE]]
        features.append(encode(torch.stack(images)).float().cpu())
    return torch.cat(features)


class Rows(Dataset[Item]):
    """Data by row.  An item holds what a batch is made of: ``prompt``, and what the method reads beside it."""

    reads_images = False
    told = ""  # what a person should know of it

    def __len__(self) -> int:
        raise NotImplementedError

    def prompt(self, row: int) -> str:
        """Without reading anything else of the row."""
        raise NotImplementedError

    def sources(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """What an edit starts from: each image for the VAE and for the text encoder."""
        return []

    def item(self, row: int, chunk: int) -> Item:
        """A row, and where its size varies by the batch, as the ``chunk``-th batch of the run shows it."""
        return self[row]

    def settle(
        self, latent_shape: tuple[int, int, int], size_multiple: int, grid: Tensor, max_side_px: int | None = None
    ) -> None:
        """Take what the model decides.  Raises UserError where its latents, sizes or times are others than the data's."""

    def order(self, seed: int, chunk_size: int) -> Sequenced:
        """Rows that ``chunk_size`` at a time can share a batch."""
        return Order(len(self), seed)


class Images(Rows):
    """Rows of an image table; without targets, where only what an edit starts from is asked for."""

    reads_images = True

    def __init__(
        self, rows: Sequence[Row], size_px: Size, *, buckets: bool = False, varies: bool = False, seed: int = 0
    ) -> None:
        """``buckets``: targets keep about their own proportions, at the area of ``size_px``; ``varies``: of which some
        batches have less (``side_divisor``)."""
        self.rows, self.size_px, self.buckets, self.varies, self.seed = rows, size_px, buckets, varies, seed
        self.side_px, self.multiple = math.sqrt(size_px[0] * size_px[1]), 1
        self.sizes_px = [size_px] * len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, row: int) -> str:
        return self.rows[row].prompt

    def sources(self, row: int) -> list[tuple[Tensor, Tensor]]:
        return read_sources(self.rows[row])

    def settle(
        self, latent_shape: tuple[int, int, int], size_multiple: int, grid: Tensor, max_side_px: int | None = None
    ) -> None:
        self.multiple = size_multiple
        if self.buckets:
            options = tuple(bucket_sizes(self.side_px, size_multiple, max_side_px))
            find = lru_cache(maxsize=4096)(lambda size: nearest(size, options))
            self.sizes_px = [find(row.image_px) for row in self.rows]

    def order(self, seed: int, chunk_size: int) -> Sequenced:
        """A batch's rows have one size, and sources of the same sizes in the same order."""
        keys = [(size, row.sources_px) for size, row in zip(self.sizes_px, self.rows, strict=True)]
        return order_of(keys, chunk_size, seed)

    def __getitem__(self, row: int) -> Item:
        return self._item(row, self.sizes_px[row])

    def item(self, row: int, chunk: int) -> Item:
        size = self.sizes_px[row]
        divisor = side_divisor(self.side_px, self.seed, chunk) if self.varies else 1.0
        return self._item(row, size if divisor == 1 else sized(size, self.side_px / divisor, self.multiple))

    def _item(self, row: int, size_px: Size) -> Item:
        told = self.rows[row]
        item: Item = {"prompt": told.prompt}
        if told.image is not None:
            item["images"] = fit_image(told.image, told.place, *size_px)
        return item | sources_item(told)


def read_sources(row: Row) -> list[tuple[Tensor, Tensor]]:
    """Each source of a row for its two readers.  Raises UserError."""
    return [source_image(path, row.place, sizes) for path, sizes in zip(row.sources, row.sources_px, strict=True)]


def sources_item(row: Row) -> Item:
    """What a row with sources adds to its item."""
    return {"sources": read_sources(row)} if row.sources else {}
