"""From a method's kind of data to batches: an endless stream that can start at any sample.

Shapes: images (B, 3, H, W) in [0, 1]; latents (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train_t2i.config import EDIT_FAMILIES, Config, Settings, seen_side, source_counts
from train_t2i.data import Sequenced, batch_indices
from train_t2i.errors import UserError
from train_t2i.families.base import Source
from train_t2i.image_data import Images, Item, Rows
from train_t2i.methods import Batch
from train_t2i.pair_data import Wanted, open_pairs
from train_t2i.pictures import header_size, source_image
from train_t2i.prompt_cache import PromptCache
from train_t2i.prompts import load_prompts
from train_t2i.rows import Rejects, RowRules, in_words, load_rows
from train_t2i.sizes import source_sizes

LOOKED_UP = 1000  # prompts that are looked for in a cache before anything loads; the others when their turn comes


class Prompts(Rows):
    def __init__(self, path: str, last: int = 0) -> None:
        """``last``: only the last so many; 0: all."""
        self.prompts = load_prompts(path)
        self.rows = range(max(0, len(self.prompts) - last) if last else 0, len(self.prompts))

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, row: int) -> str:
        return self.prompts[self.rows[row]]

    def __getitem__(self, row: int) -> Item:
        return {"prompt": self.prompt(row)}


def dataset_for(kind: str, settings: Settings, rejects: Rejects | None = None) -> Rows:
    """The data of a method (``Method.data``); of prompts those that the cache was made from, of which some are looked up.

    Edit models take an image table for all of them.  Raises UserError for files that cannot be used.
    """
    run, method = settings.run, settings.method
    if kind == "pairs":
        wanted = Wanted(
            settings.size_px, method.max_pixels, method.max_row_steps, method.states_weight > 0, rules_of(run)
        )
        return open_pairs(run.data_path_train, wanted)
    if kind == "images" or run.model_family in EDIT_FAMILIES:
        return images_for(kind, settings, rejects)
    if run.prompt_cache is None:
        return Prompts(run.data_path_train)
    cache = PromptCache(run.prompt_cache)
    data = Prompts(run.data_path_train, cache.max_size)
    cache.need([data.prompt(row) for row in range(0, len(data), max(1, len(data) // LOOKED_UP))])
    return data


def rules_of(run: Config) -> RowRules:
    """What a run asks of the rows of image tables, whatever its method."""
    return RowRules(run.train_data_dir, True, source_counts(run.model_family), (run.source_size, seen_side(run)))


def images_for(kind: str, settings: Settings, rejects: Rejects | None) -> Images:
    """The rows of an image table, with targets where the method learns from them."""
    run, targets = settings.run, kind == "images"
    buckets, varies = (settings.method.enable_bucket, settings.method.random_hw_adapt) if targets else (False, False)
    rules = replace(rules_of(run), targets=targets, headers=buckets)
    rows = load_rows(run.data_path_train, rules, rejects)
    told = rejects.settle(Path(run.data_path_train), len(rows) + len(rejects.bad)) if rejects else ""
    data = Images(rows, settings.size_px, buckets=buckets, varies=varies, seed=run.seed)
    data.told = told
    return data


def sources_of(data: Rows, rows: Sequence[int]) -> list[list[Source]]:
    """What the edits of some rows start from."""
    return [[Source(*both) for both in data.sources(row)] for row in rows]


def asked_of(settings: Settings, path: str, count: int) -> tuple[list[str], list[list[Source]]]:
    """The first ``count`` prompts of a file, and what they edit where the model edits: then the file is an image table.

    Raises UserError.
    """
    run = settings.run
    if run.model_family not in EDIT_FAMILIES:
        return load_prompts(path)[:count], []
    rows = images_for("prompts", replace(settings, run=replace(run, data_path_train=path, train_data_dir=None)), None)
    chosen = range(min(count, len(rows)))
    return [rows.prompt(row) for row in chosen], sources_of(rows, chosen)


def sources_at(settings: Settings, paths: Sequence[str]) -> list[Source]:
    """The images at some paths, as the model of ``settings`` is shown sources.  Raises UserError."""
    run, (least, most) = settings.run, source_counts(settings.run.model_family)
    if not least <= len(paths) <= most:
        raise UserError(
            f"--source: {len(paths)} are given, {run.model_family} takes {in_words(least, most)}", "give as many"
        )
    sides_px = run.source_size, seen_side(run)
    return [
        Source(*source_image(Path(p), "--source", source_sizes(*header_size(Path(p), "--source"), *sides_px)))
        for p in paths
    ]


@dataclass(frozen=True)
class Feed:
    """Batches of this process by sample index."""

    dataset: Rows
    seed: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    num_workers: int = 0

    @property
    def order(self) -> Sequenced:
        """Sample index -> row.  All rows of a tick can share a batch: processes do equal work, and any number of them
        that keeps the global batch keeps the order."""
        return self.dataset.order(self.seed, self.global_batch)

    @property
    def global_batch(self) -> int:
        """Samples a tick."""
        return self.batch_size * self.accumulate * self.world

    def ticks(self, samples_seen: int) -> Iterator[list[Batch]]:
        """The micro-batches of each tick, for ever, from the sample ``samples_seen`` on."""
        loader = DataLoader(
            _Ordered(self.dataset, self.order, self.global_batch),
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

    dataset: Rows
    order: Sequenced
    chunk_size: int

    def __getitem__(self, sample_index: int) -> Item:
        """A UserError is handed on as a value: a reading process would wrap it in its traceback."""
        try:
            row = self.order.index_at(sample_index)
            item = self.dataset.item(row, sample_index // self.chunk_size)
            return {"index": sample_index, "row": row, **item}
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

    def listed(key: str) -> list[Any]:
        return [item[key] for item in items] if key in items[0] else []

    return Batch(
        indices=listed("index"),
        prompts=listed("prompt"),
        sources=[[Source(*both) for both in sources] for sources in listed("sources")],
        rows=listed("row"),
        images=stacked("images"),
        seeds=listed("seed"),
        rand_devices=listed("rand_device"),
        num_steps=listed("num_steps"),
        latents=stacked("latents"),
        states=stacked("states"),
    )
