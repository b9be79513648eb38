"""What Direct Distillation trains on: rows of (prompt, noise seed) with the teacher's result, a stored latent or an image.

Two kinds of data.  A folder that the pairs verb wrote holds exact latents.  A table (csv, tsv, json, jsonl, parquet) with the
columns image, prompt, seed, rand_device, num_inference_steps, cfg_scale is DiffSynth-Studio's own format, where
``num_inference_steps`` is the student's.  What would train on another image than that noise leads to is refused, with its
row: no seed, noise of a device that is not here, an image that would have to be scaled or cropped.
Shapes: latent (C, H, W); states (N - 1, C, H, W); images (3, height, width) in [0, 1].
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from train_t2i.data import Sequenced, order_of
from train_t2i.errors import UserError
from train_t2i.image_data import Item, Rows
from train_t2i.pictures import exact_image, image_size
from train_t2i.rows import Row, load_rows
from train_t2i.tables import place_of, records, short

COLUMNS = ("image", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale", "height", "width")
SETTINGS = "pairs.json"
TABLE = "metadata.csv"


@dataclass(frozen=True, slots=True)
class Start:
    """What a student starts from in one row."""

    prompt: str
    seed: int
    rand_device: str  # whose generator drew the noise
    num_steps: int  # of the student, as the row says; 0: it says nothing

    def item(self) -> Item:
        return {
            "prompt": self.prompt, "seed": self.seed, "rand_device": self.rand_device, "num_steps": self.num_steps,
        }  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a run needs of its data."""

    size_px: tuple[int, int]  # (height, width)
    max_pixels: int = 0  # of an image, each of its own size; 0: all are of ``size_px``
    max_row_steps: int = 0  # rows have their own numbers of steps, up to this; 0: they have not
    states: bool = False  # where the teacher was at the student's times


def read_starts(path: Path, max_row_steps: int = 0) -> list[Start]:
    """Every row of a table.  Raises UserError."""
    starts = []
    for number, record in records(path, COLUMNS):
        place = place_of(path, number)
        if missing := [name for name in ("prompt", "seed") if name not in record]:
            raise UserError(f"{path}: no column {missing[0]}", f"the pairs command writes {', '.join(COLUMNS)}")
        seed = _whole(record["seed"])
        if seed is None or seed >= 2**63:
            raise UserError(
                f"{place}: seed is {short(repr(record['seed']))}", "write the number of its noise: without it there is nothing to learn"
            )  # fmt: skip
        steps = record.get("num_inference_steps")
        num_steps = _whole(steps) or 0
        if max_row_steps and not 1 <= num_steps <= max_row_steps:
            raise UserError(
                f"{place}: num_inference_steps is {short(repr(steps))}, --max-row-steps {max_row_steps}",
                f"write a number from 1 to {max_row_steps}, or raise --max-row-steps",
            )
        prompt = record["prompt"] if isinstance(record["prompt"], str) else ""  # parquet's and json's null
        starts.append(Start(prompt, seed, _device(record.get("rand_device"), place), num_steps))
    if not starts:
        raise UserError(f"{path}: no row", "run the pairs command again")
    return starts


def _whole(value: Any) -> int | None:
    """A number or its text -> int, if it is a whole one from 0 up."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    return int(value) if isinstance(value, (int, float)) and value >= 0 and value == int(value) else None


def _device(value: Any, place: str) -> str:
    device = str(value or "cpu").strip()
    if device not in ("cpu", "cuda"):
        raise UserError(f"{place}: rand_device is {short(repr(device))}", "cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{place}: its noise was drawn on cuda, which is not here", "train on a GPU, or render with rand_device cpu"
        )
    return device


class Pairs(Rows):
    """What both kinds share."""

    starts: list[Start]

    def __len__(self) -> int:
        return len(self.starts)

    def prompt(self, row: int) -> str:
        return self.starts[row].prompt


class StoredPairs(Pairs):
    """A folder of the pairs verb; latents are mapped, not loaded."""

    def __init__(self, path: str, wanted: Wanted) -> None:
        self.folder, self.wanted = Path(path), wanted
        settings, rows = self.folder / SETTINGS, self.folder / TABLE
        if not settings.is_file() or not rows.is_file():
            raise UserError(
                f"--data-path-train {path}: not a pairs folder",
                "make one: python -m train_t2i pairs --out DIR, or give a table with the columns image, prompt, seed",
            )
        size = read_settings(settings).get("shard_size")
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{settings}: shard_size is {size!r}", "make the pairs in another --out")
        if wanted.max_pixels:
            raise UserError(
                f"--max-pixels is for tables of images; the latents of {path} have one size", "leave it out"
            )
        self.shard_size: int = size
        self.starts = read_starts(rows, wanted.max_row_steps)
        with self._shard(0) as file:
            if wanted.states and "states" not in file.keys():  # noqa: SIM118 - no mapping
                raise UserError(f"--states-weight: {path} has no states of its teacher", "make the pairs with --states")
            self.grid = file.get_tensor("grid") if wanted.states else torch.empty(0)
            self.latent_shape: tuple[int, int, int] = tuple(file.get_slice("latents").get_shape()[1:])

    def settle(
        self, latent_shape: tuple[int, int, int], size_multiple: int, grid: Tensor, max_side_px: int | None = None
    ) -> None:
        if self.latent_shape != latent_shape:
            raise UserError(
                f"{self.folder}: latents of shape {self.latent_shape}, this run needs {latent_shape}",
                "make pairs with the same --resolution and model",
            )
        then = self.grid
        if self.wanted.states and (then.shape != grid.shape or not torch.allclose(then, grid, rtol=0, atol=1e-6)):
            past, now = (", ".join(f"{t:.4f}" for t in times[:-1].tolist()) for times in (then, grid))
            raise UserError(
                f"--states-weight: the states of {self.folder} are of the times {past}, this run's are {now}",
                "make the pairs with --states, this run's --shift, and --student-num-steps as its --sample-num-steps",
            )

    def __getitem__(self, row: int) -> Item:
        shard, position = divmod(row, self.shard_size)
        names = ("latents", "states") if self.wanted.states else ("latents",)
        with self._shard(shard) as file:
            return self.starts[row].item() | {name: file.get_slice(name)[position] for name in names}

    @contextlib.contextmanager
    def _shard(self, shard: int) -> Iterator[Any]:
        path = shard_path(self.folder, shard)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError, IndexError) as error:
            raise UserError(f"{path}: cannot be read ({error})", "delete it and run the pairs command again") from None


class ImagePairs(Pairs):
    """A table of the teacher's images; they are encoded as training meets them."""

    reads_images = True

    def __init__(self, path: str, wanted: Wanted) -> None:
        if wanted.states:
            raise UserError(f"--states-weight: {path} has no states of its teacher", "give a folder of the pairs verb")
        self.wanted = wanted
        self.starts = read_starts(Path(path), wanted.max_row_steps)
        self.rows: list[Row] = load_rows(path)
        self.sizes_px = [image_size(row.target, row.place) for row in self.rows]

    def settle(
        self, latent_shape: tuple[int, int, int], size_multiple: int, grid: Tensor, max_side_px: int | None = None
    ) -> None:
        for row, size in zip(self.rows, self.sizes_px, strict=True):
            self._check_size(row, size, size_multiple)

    def _check_size(self, row: Row, size_px: tuple[int, int], multiple: int) -> None:
        """An image that would be scaled or cropped is no longer what its noise leads to."""
        height, width = size_px
        told = f"{row.place}: image {row.target.name} has {width}x{height} pixels"
        limit = self.wanted.max_pixels
        if not limit and size_px != self.wanted.size_px:
            wanted = "x".join(str(side) for side in reversed(self.wanted.size_px))
            raise UserError(
                f"{told}, this run {wanted}: it would have to be scaled", "set --resolution, or --max-pixels"
            )
        if limit and height * width > limit:
            raise UserError(f"{told}, more than --max-pixels {limit}: it would have to be scaled", "raise --max-pixels")
        if height % multiple or width % multiple:
            raise UserError(f"{told}, not multiples of {multiple}: it would have to be cropped", "render other sizes")

    def order(self, seed: int, chunk_size: int) -> Sequenced:
        return order_of(self.sizes_px, chunk_size, seed)

    def __getitem__(self, row: int) -> Item:
        return self.starts[row].item() | {
            "images": exact_image(self.rows[row].target, self.rows[row].place, *self.sizes_px[row])
        }


def open_pairs(path: str, wanted: Wanted) -> StoredPairs | ImagePairs:
    """Raises UserError for data that cannot be used."""
    return ImagePairs(path, wanted) if Path(path).is_file() else StoredPairs(path, wanted)


def read_settings(path: Path) -> dict[str, Any]:
    """What a pairs folder was begun with.  Raises UserError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "make the pairs in another --out") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not the settings of a pairs folder", "make the pairs in another --out")
    return settings


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"
