"""Prompts and images by sample index, in an order that can start anywhere.

Readers refuse what they cannot read whole: UserError names the file and the line or row; nothing is skipped silently.
"""

import codecs
import contextlib
import csv
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from train_t2i.errors import UserError

PROMPT_COLUMNS = ("prompt", "text", "caption")
MAX_PROMPT_BYTES = 16_000
MAX_LINE_BYTES = 1_000_000  # of a csv or jsonl file, which may hold more columns than the prompt
MAX_IMAGE_PIXELS = 64_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # all but the tab
CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]")  # the same in UTF-8
NO_CONTROL = bytes([9, 10, *range(0x20, 0x7F), *range(0x80, 0x100)])
BLOCK_BYTES = 1 << 20
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- order


class Order:
    """A permutation of ``count`` rows for every epoch, a function of (seed, epoch) alone."""

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("an order needs at least one row")
        self.count, self.seed = count, seed
        self._epochs: dict[int, Tensor] = {}  # two at most: a batch may straddle the end of an epoch

    def index_at(self, sample_index: int) -> int:
        """The row shown as sample ``sample_index`` (0, 1, ...), whatever was asked before."""
        epoch, position = divmod(sample_index, self.count)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            key = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            dtype = torch.int32 if self.count < 2**31 else torch.int64
            self._epochs[epoch] = torch.randperm(self.count, generator=generator).to(dtype)
        return int(self._epochs[epoch][position])


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


# ---------------------------------------------------------------- prompts


def load_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a file: .csv, .tsv, .jsonl, .json, .parquet with a prompt column; any other is one prompt a line.

    Blank prompts are dropped and duplicates kept, both counted in the log.  Raises UserError.
    """
    path = Path(path)
    if path.suffix.lower() in READERS:
        found = [_prompt_of(record, path, number) for number, record in _records(path, PROMPT_COLUMNS)]
    else:
        found = [text.strip() for _, text in _lines(path, MAX_PROMPT_BYTES)]
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise UserError(f"{path} holds no prompt, only {len(found)} blank lines or rows", "put one prompt on each line")
    double, blank = len(prompts) - len(set(prompts)), len(found) - len(prompts)
    log.info("%s: %d prompts, %d duplicates kept, %d blank dropped", path, len(prompts), double, blank)
    return prompts


def _prompt_of(record: Mapping[str, Any], path: Path, number: int) -> str:
    name = next((name for name in PROMPT_COLUMNS if name in record), None)
    if name is None:
        raise UserError(
            f"{_place(path, number)}: no column {', '.join(PROMPT_COLUMNS)}; it has: {_short(', '.join(record))}",
            "name the column of the prompts so",
        )
    return _clean(record[name], name, path, number)


def _clean(value: object, name: str, path: Path, number: int) -> str:
    """A cell as one stripped line of text; None is blank."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{_place(path, number)}: {name} is {_short(repr(value))}, not text")
    text = re.sub(r"[\r\n\t]+", " ", value).strip()
    if bad := CONTROL.search(text):
        raise UserError(f"{_place(path, number)}: control character U+{ord(bad[0]):04X} in {name}", "remove it")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(
            f"{_place(path, number)}: half a surrogate pair in {name}", "write it as valid Unicode"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise UserError(f"{_place(path, number)}: {name} is longer than {MAX_PROMPT_BYTES} bytes", "shorten it")
    return text


# ---------------------------------------------------------------- tables


def _lines(path: Path, limit: int) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a UTF-8 file, split at \\n and \\r\\n only.  Raises UserError."""
    number = 0
    with _open(path) as file:
        while block := file.read(BLOCK_BYTES) + file.readline(limit + 3):  # up to the end of a line, if that is near
            if number == 0:
                block = block.removeprefix(codecs.BOM_UTF8)
            sound = _sound_lines(block, limit)
            if sound is None:  # something is wrong in it, or it ends in a lone \\r: look at each line
                raws = enumerate(block.removesuffix(b"\n").split(b"\n"), number + 1)
                sound = (_line(raw.removesuffix(b"\r"), f"{path}:{place}", limit) for place, raw in raws)
            for text in sound:
                number += 1
                yield number, text


def _sound_lines(block: bytes, limit: int) -> Iterable[str] | None:
    """The lines of whole megabytes at once, or None if any of them may be refused."""
    block = block.replace(b"\r\n", b"\n").removesuffix(b"\n")
    if max(map(len, block.split(b"\n"))) > limit or block.translate(None, NO_CONTROL):
        return None
    try:
        return None if re.search(rb"\xc2[\x80-\x9f]", block) else block.decode().split("\n")
    except UnicodeDecodeError:
        return None


def _line(raw: bytes, place: str, limit: int) -> str:
    if len(raw) > limit:
        raise UserError(f"{place}: a line longer than {limit} bytes", "one prompt a line, not so long")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}:{error.start + 1}: not valid UTF-8", _encoding_hint(raw)) from None
    if bad := CONTROL_BYTES.search(raw):
        kind = "NUL byte" if bad[0] == b"\0" else f"control character U+{ord(bad[0].decode()):04X}"
        raise UserError(f"{place}:{bad.start() + 1}: {kind}", "save the file as plain UTF-8 text")
    return text


def _encoding_hint(raw: bytes) -> str:
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return f"convert it: iconv -f {'UTF-16' if wide else 'ITS_ENCODING'} -t UTF-8"


def _open(path: Path) -> BinaryIO:
    """A file that is there, is a file, can be read and is not empty."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a file", "name a file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file", "save it to a file first: it is read more than once")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty", "put one prompt on each line")
        return path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}", "check the path") from None


def _records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, {column: cell}) of a table; of parquet only the columns wanted.  Raises UserError."""
    _open(path).close()
    yield from READERS[path.suffix.lower()](path, wanted)


def _csv(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    text = (line + "\n" for _, line in _lines(path, MAX_LINE_BYTES))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: two columns of the same name", "the first line must name the columns")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(cells)} cells under {len(header)} columns",
                    'put a cell that has a comma in it into "double quotes"',
                )
            yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}", "check the quotes") from None


def _jsonl(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, MAX_LINE_BYTES):
        if line.strip():
            yield number, _record(_parse(line, path, number), path, number)


def _json(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8", _encoding_hint(error.object)) from None
    items = _parse(text, path, 1)
    if isinstance(items, dict) and items and all(isinstance(column, list) for column in items.values()):
        if len({len(column) for column in items.values()}) > 1:
            raise UserError(f"{path}: its columns have different lengths", "give every row every column")
        items = [dict(zip(items, cells)) for cells in zip(*items.values())]
    if not isinstance(items, list):
        raise UserError(f"{path} is neither a list of rows nor a table of columns", 'write [{"prompt": "..."}, ...]')
    for number, item in enumerate(items, 1):
        yield number, _record(item, path, number)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}:{error.colno}: bad JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets a thousand deep
        raise UserError(f"{path}:{line}: bad JSON: {error}") from None


def _record(item: object, path: Path, number: int) -> dict[str, Any]:
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, dict):
        return item
    raise UserError(f"{_place(path, number)}: neither an object nor text", 'write {"prompt": "..."}')


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in wanted]
            if not columns:
                raise UserError(f"{path}: no column {', '.join(wanted)}; it has: {_short(', '.join(names))}")
            for batch in file.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}, after row {number}: bad parquet: {_short(str(error))}", "write the file anew"
        ) from None


READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def _place(path: Path, number: int) -> str:
    return f"{path}, row {number}" if path.suffix.lower() in (".json", ".parquet") else f"{path}:{number}"


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


# ---------------------------------------------------------------- images


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an image-text table; the columns of the pairs are None where the table has none."""

    table: Path
    number: int
    image: Path
    prompt: str
    seed: int | None = None
    rand_device: str | None = None
    num_inference_steps: int | None = None
    cfg_scale: float | None = None
    height: int | None = None
    width: int | None = None

    @property
    def place(self) -> str:
        """Where a person finds it: FILE:LINE or FILE, row N."""
        return _place(self.table, self.number)


NUMBERS = {"seed": int, "num_inference_steps": int, "cfg_scale": float, "height": int, "width": int}


def load_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a table (.csv, .tsv, .jsonl, .json, .parquet) with the columns image and prompt, and those of Row.

    Image paths are relative to the table's folder and stay inside it; every image must be there.  Raises UserError.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is not a table", f"give one of {', '.join(READERS)} with the columns image and prompt")
    resolve = _Inside(path)
    rows = []
    for number, record in _records(path, ("image", *PROMPT_COLUMNS, "rand_device", *NUMBERS)):
        prompt = _prompt_of(record, path, number)
        if not (name := _clean(record.get("image"), "image", path, number)):
            raise UserError(f"{_place(path, number)}: no image", "the column image holds its path beside the table")
        extra: dict[str, Any] = {
            key: _number(kind, record.get(key), key, path, number) for key, kind in NUMBERS.items()
        }
        extra["rand_device"] = _clean(record.get("rand_device"), "rand_device", path, number) or None
        rows.append(Row(path, number, resolve(name, number), prompt, **extra))
    if not rows:
        raise UserError(f"{path} holds no row")
    log.info("%s: %d rows, %d of them with a blank prompt", path, len(rows), sum(not row.prompt for row in rows))
    return rows


def _number(kind: type, value: object, name: str, path: Path, number: int) -> int | float | None:
    """A cell as a finite number of ``kind``; blank, None and NaN (an absent cell, to pandas) are None."""
    cell, least = value, -math.inf if name in ("seed", "cfg_scale") else 1
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(cell, str) and cell.strip():
            cell = int(cell) if re.fullmatch(r"\s*[-+]?\d+\s*", cell) else float(cell)
        if cell is None or isinstance(cell, str) or cell != cell:
            return None
        if type(cell) in (int, float) and kind(cell) == cell and least <= cell < 2**63:  # type: ignore[operator]
            return kind(cell)
    raise UserError(f"{_place(path, number)}: {name} is {_short(repr(value))}", "write a number that it can be")


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
                f"{_place(self.table, number)}: image {_short(name)} is outside {self.root}",
                "keep the images, not links to them, in the table's folder",
            )
        if not os.path.isfile(full):  # noqa: PTH113
            raise UserError(f"{_place(self.table, number)}: no image {_short(name)}", f"looked in {self.root}")
        return Path(full)


def load_image(row: Row, height_px: int, width_px: int) -> Tensor:
    """(3, height_px, width_px) fp32 in [0, 1].  Raises UserError when it is broken or has another size."""
    image = _decode(row)
    if image.size != (width_px, height_px):
        raise UserError(
            f"{row.place}: image {row.image.name} is {image.width}x{image.height} px, not {width_px}x{height_px}",
            "resize it, or set the resolution to it",
        )
    return _tensor(image)


def fit_image(row: Row, height_px: int, width_px: int) -> Tensor:
    """The same from an image of any size: its largest centred part of that shape, resized (bicubic, antialiased)."""
    image = _decode(row)
    scale = min(image.width / width_px, image.height / height_px)  # pixels of the image for one of the result
    width, height = width_px * scale, height_px * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return _tensor(image.resize((width_px, height_px), Image.Resampling.BICUBIC, box))


def _decode(row: Row) -> Image.Image:
    """The image upright, in RGB, transparent parts on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower, and an error
            opened = Image.open(row.image, formats=IMAGE_FORMATS)
        with opened as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} px is more than {MAX_IMAGE_PIXELS} pixels")
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            upright = ImageOps.exif_transpose(image)
            if "A" in upright.getbands() or "transparency" in upright.info:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")
    except Exception as error:  # decoders raise whatever a broken file makes them
        raise UserError(
            f"{row.place}: image {row.image.name} cannot be used: {_short(str(error))}", "replace it or drop the row"
        ) from None


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
