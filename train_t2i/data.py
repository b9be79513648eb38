"""The order of samples, which can start anywhere, and images by row.

What cannot be used is a UserError that names the file and the line or row; nothing is skipped silently.
"""

import contextlib
import hashlib
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from train_t2i.errors import UserError
from train_t2i.tables import PROMPT_COLUMNS, READERS, clean, place_of, prompt_of, records, short

MAX_IMAGE_PIXELS = 64_000_000
ORIENTATION = 0x0112  # EXIF; 5 to 8 are turned by a quarter
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- order


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


# ---------------------------------------------------------------- images


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an image-text table."""

    table: Path
    number: int
    image: Path
    prompt: str

    @property
    def place(self) -> str:
        """Where a person finds it: FILE:LINE or FILE, row N."""
        return place_of(self.table, self.number)


def load_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a table (.csv, .tsv, .jsonl, .json, .parquet) with the columns image and prompt.

    Image paths are relative to the table's folder and stay inside it; every image must be there.  Raises UserError.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is not a table", f"give one of {', '.join(READERS)} with the columns image and prompt")
    resolve = _Inside(path)
    rows = []
    for number, record in records(path, ("image", *PROMPT_COLUMNS)):
        prompt = prompt_of(record, path, number)
        if not (name := clean(record.get("image"), "image", path, number)):
            raise UserError(f"{place_of(path, number)}: no image", "the column image holds its path beside the table")
        rows.append(Row(path, number, resolve(name, number), prompt))
    if not rows:
        raise UserError(f"{path} holds no row")
    log.info("%s: %d rows, %d of them with a blank prompt", path, len(rows), sum(not row.prompt for row in rows))
    return rows


class _Inside:
    """Image paths of one table: relative to its folder, and inside it even when links are followed."""

    def __init__(self, table: Path) -> None:
        self.table, self.root = table, os.path.realpath(table.parent)
        self._folders: dict[str, str] = {}  # links of a folder are looked up once

    def __call__(self, name: str, number: int) -> Path:
        folder, file = os.path.split(os.path.join(self.root, name))  # noqa: PTH118 - pathlib is slow for millions
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        full = os.path.join(self._folders[folder], file)  # noqa: PTH118
        if os.path.islink(full) or file in ("", ".", ".."):  # noqa: PTH114
            full = os.path.realpath(full)
        if not full.startswith(self.root.rstrip(os.sep) + os.sep):
            raise UserError(
                f"{place_of(self.table, number)}: image {short(name)} is outside {self.root}",
                "keep the images, not links to them, in the table's folder",
            )
        if not os.path.isfile(full):  # noqa: PTH113
            raise UserError(f"{place_of(self.table, number)}: no image {short(name)}", f"looked in {self.root}")
        return Path(full)


def fit_image(row: Row, height_px: int, width_px: int) -> Tensor:
    """(3, height_px, width_px) fp32 in [0, 1]: the largest centred part of that shape, resized (bicubic, antialiased).

    Raises UserError for an image that cannot be used.
    """
    image = _decode(row)
    scale = min(image.width / width_px, image.height / height_px)  # pixels of the image for one of the result
    width, height = width_px * scale, height_px * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    fitted = image.resize((width_px, height_px), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float().div_(255)


def image_size(row: Row) -> tuple[int, int]:
    """(height, width) in pixels of an image as it is shown; reads its header alone.  Raises UserError."""
    with _opened(row) as image:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def exact_image(row: Row, height_px: int, width_px: int) -> Tensor:
    """(3, height_px, width_px) fp32 in [0, 1], every pixel as it is in the file.  Raises UserError for another size."""
    image = _decode(row)
    if image.size != (width_px, height_px):
        raise UserError(f"{row.place}: image {row.image.name} has changed while it was used", "start again")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


@contextlib.contextmanager
def _opened(row: Row) -> Iterator[Image.Image]:
    """An image of a format and size that can be used.  Whatever goes wrong inside is told with the row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower, and an error
            opened = Image.open(row.image, formats=IMAGE_FORMATS)
        with opened as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} px is more than {MAX_IMAGE_PIXELS} pixels")
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            yield image
    except Exception as error:  # decoders raise whatever a broken file makes them
        raise UserError(
            f"{row.place}: image {row.image.name} cannot be used: {short(str(error))}", "replace it or drop the row"
        ) from None


def _decode(row: Row) -> Image.Image:
    """The image upright, in RGB, transparent parts on white."""
    with _opened(row) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert("RGB")
