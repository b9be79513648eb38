"""From a method's kind of data to batches: an endless stream that can start at any sample.

Shapes: images (B, 3, H, W) in [0, 1]; noise and latents (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train_t2i.data import Order, Row, batch_indices, fit_image, load_rows
from train_t2i.errors import UserError
from train_t2i.methods import Batch
from train_t2i.pairs import PairStore
from train_t2i.prompt_cache import PromptCache
from train_t2i.prompts import load_prompts
from train_t2i.randomness import seeded_noise

Item = dict[str, Any]
LOOKED_UP = 1000  # prompts that are looked for in a cache before anything loads; the others when their turn comes


class Prompts(Dataset[Item]):
    def __init__(self, path: str, last: int = 0) -> None:
        """``last``: only the last so many; 0: all."""
        self.prompts = load_prompts(path)
        self.rows = range(max(0, len(self.prompts) - last) if last else 0, len(self.prompts))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        return {"prompt": self.prompts[self.rows[row]]}


class Images(Dataset[Item]):
    """Image-text rows, scaled and centre-cropped to the run's size."""

    def __init__(self, path: str, size_px: tuple[int, int]) -> None:
        self.rows: list[Row] = load_rows(path)
        self.height_px, self.width_px = size_px

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        return {
            "prompt": self.rows[row].prompt,
            "images": fit_image(self.rows[row], self.height_px, self.width_px),
        }


class Pairs(Dataset[Item]):
    """(noise, prompt, teacher latent); the noise is made again from its seed."""

    def __init__(self, path: str) -> None:
        self.store = PairStore(path)

    def check_shape(self, latent_shape: tuple[int, int, int]) -> None:
        if self.store.latent_shape != latent_shape:
            raise UserError(
                f"{self.store.folder}: latents of shape {self.store.latent_shape}, this run needs {latent_shape}",
                "make pairs with the same --resolution and model",
            )

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> Item:
        pair = self.store[row]
        noise = seeded_noise([pair.seed], self.store.latent_shape)[0]
        return {"prompt": pair.prompt, "noise": noise, "latents": pair.latent}


def dataset_for(
    kind: str, path: str, size_px: tuple[int, int], prompt_cache: str | None = None
) -> Prompts | Images | Pairs:
    """The data of a method (``Method.data``); of prompts those that the cache was made from, of which some are looked up.

    Raises UserError for files that cannot be used.
    """
    if kind != "prompts":
        return Images(path, size_px) if kind == "images" else Pairs(path)
    if prompt_cache is None:
        return Prompts(path)
    cache = PromptCache(prompt_cache)
    data = Prompts(path, cache.max_size)
    cache.need([data[row]["prompt"] for row in range(0, len(data), max(1, len(data) // LOOKED_UP))])
    return data


@dataclass(frozen=True)
class Feed:
    """Batches of this process by sample index."""

    dataset: Any
    seed: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    num_workers: int = 0

    @property
    def global_batch(self) -> int:
        """Samples a tick."""
        return self.batch_size * self.accumulate * self.world

    def ticks(self, samples_seen: int) -> Iterator[list[Batch]]:
        """The micro-batches of each tick, for ever, from the sample ``samples_seen`` on."""
        loader = DataLoader(
            _Ordered(self.dataset, Order(len(self.dataset), self.seed)),
            batch_sampler=_Indices(self, samples_seen),
            collate_fn=_to_batch,
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            generator=torch.Generator(),  # keeps the loader's own seed away from the global generator
        )
        stream = iter(loader)
        while True:
            yield [_checked(next(stream)) for _ in range(self.accumulate)]


@dataclass(frozen=True)
class _Indices:
    feed: Feed
    samples_seen: int

    def __iter__(self) -> Iterator[list[int]]:
        feed, seen = self.feed, self.samples_seen
        while True:
            for micro in range(feed.accumulate):
                yield batch_indices(seen, feed.batch_size, feed.rank, feed.world, micro, feed.accumulate)
            seen += feed.global_batch


@dataclass(frozen=True)
class _Ordered(Dataset[Item]):
    """Sample index -> item."""

    dataset: Any
    order: Order

    def __getitem__(self, sample_index: int) -> Item:
        """A UserError is handed on as a value: a reading process would wrap it in its traceback."""
        try:
            row = self.order.index_at(sample_index)
            return {"index": sample_index, "row": row, **self.dataset[row]}
        except UserError as error:
            return {"index": sample_index, "error": (error.message, error.hint, error.exit_code)}


def _checked(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _to_batch(items: list[Item]) -> Batch | UserError:
    for item in items:
        if "error" in item:
            return UserError(*item["error"])

    def stacked(key: str) -> Tensor | None:
        return torch.stack([item[key] for item in items]) if key in items[0] else None

    return Batch(
        indices=[item["index"] for item in items],
        prompts=[item["prompt"] for item in items],
        rows=[item["row"] for item in items],
        images=stacked("images"),
        noise=stacked("noise"),
        latents=stacked("latents"),
    )
