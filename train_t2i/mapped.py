"""safetensors files larger than memory: written from front to back, read through a memory map.

The format is eight bytes of length, a JSON header, then the tensors' bytes.  What is mapped does not count as used for long:
``release`` gives its pages back, and the system keeps them as its cache of the disk.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from train_t2i import storage
from train_t2i.storage import Damaged

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 1 << 20
ALIGN = 64
CHUNK = 1 << 20  # elements
UNKNOWN = 1 << 60  # a size that is not known yet; no real one has more digits
LEFT_FOR_S = 24 * 3600  # from then on a temporary file that nobody has written to is nobody's; a batch takes minutes
# What garbage makes the parsers raise.
GARBAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Mapped:
    """A file's arrays by name, and its metadata.  Raises Damaged for a file that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.arrays, self.metadata = self._parse()
        except OSError as error:
            raise Damaged(f"{path}: cannot be read ({error.strerror})") from None
        except GARBAGE as error:
            raise Damaged(f"{path}: is not whole, or not of this toolkit ({error})") from None

    def _parse(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        size = int.from_bytes(self.map[:8], "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError("no header")
        header = json.loads(self.map[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise TypeError("no metadata")
        arrays, end = {}, 8 + size
        for name, entry in header.items():
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            array = np.frombuffer(self.map, DTYPES[entry["dtype"]], int(np.prod(entry["shape"], dtype=np.int64)), first)
            if array.nbytes != last - first:
                raise ValueError(f"{name} has another size than its shape")
            arrays[name], end = array.reshape(entry["shape"]), max(end, last)
        if end != len(self.map):
            raise ValueError(f"{len(self.map)} bytes of {end}")
        return arrays, metadata

    def require(self, wanted: Mapping[str, tuple[np.dtype, int | None]]) -> None:
        """Raise Damaged unless these vectors (dtype, elements; None: any number) are here."""
        for name, (dtype, count) in wanted.items():
            if name not in self.arrays:
                raise Damaged(f"{self.path}: holds no {name}")
            array = self.arrays[name]
            if array.dtype != dtype or array.ndim != 1 or count not in (None, len(array)):
                raise Damaged(f"{self.path}: its {name} are of another type or number")

    def release(self) -> None:
        """Give the pages back that were looked at."""
        self.map.madvise(mmap.MADV_DONTNEED)


def header_of(shapes: Mapping[str, tuple[np.dtype, int]], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The first bytes of a file of vectors (dtype, elements), padded to at least ``room``."""
    told: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, count) in shapes.items():
        told[name] = {"dtype": NAMES[dtype], "shape": [count], "data_offsets": [at, at + count * dtype.itemsize]}
        at += count * dtype.itemsize
    text = json.dumps(told, separators=(",", ":"), sort_keys=False).encode()
    whole = max(room, -(-(8 + len(text)) // ALIGN) * ALIGN)
    return (whole - 8).to_bytes(8, "little") + text.ljust(whole - 8)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A whole file of vectors, which may be mapped themselves, complete or absent.  Raises OSError."""
    shapes = {name: (array.dtype, len(array)) for name, array in arrays.items()}
    with replacing(path) as file:
        file.write(header_of(shapes, metadata))
        for array in arrays.values():
            for first in range(0, len(array), CHUNK):
                file.write(array[first : first + CHUNK].tobytes())


def here() -> str:
    """Where a process's number means this process: host and, since containers may share its name, their space of numbers."""
    return f"{socket.gethostname()}-{Path('/proc/self/ns/pid').stat().st_ino}"


def sweep(folder: Path) -> None:
    """Remove the temporary files of ``replacing`` that nobody writes any more: killed processes leave them.

    Of this host those of dead processes, of others (who cannot be asked) those that were not written to for a day.
    """
    ours = re.compile(rf"\..+\.{re.escape(here())}\.(\d+)\.\w+\.tmp")
    for left in folder.glob(".*.tmp"):
        owner = ours.fullmatch(left.name)
        with contextlib.suppress(OSError):  # another process sweeps as well, or it is another user's
            if (owner and not storage.alive(int(owner[1]))) or time.time() - left.stat().st_mtime > LEFT_FOR_S:
                left.unlink()


class replacing:
    """A new file under a temporary name of its own, which becomes ``path`` at once and durably when all went well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{here()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> BinaryIO:
        storage.before("write", self.temporary)
        self.file = self.temporary.open("wb")
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.file.close()
            if kind is None:
                storage.sync(self.temporary)
                storage.rename(self.temporary, self.path)
        finally:
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes blobs one after the other, then the tables that say where they lie: memory holds the tables alone."""

    def __init__(self, file: BinaryIO, count: int, tables: Mapping[str, np.dtype], metadata: Mapping[str, str]) -> None:
        self.file, self.metadata = file, metadata
        self.tables = {name: np.zeros(count, dtype) for name, dtype in tables.items()}
        self.offsets = np.zeros(count + 1, "<i8")
        self.room = len(header_of(self._shapes(UNKNOWN), metadata))
        file.seek(self.room + self.offsets.nbytes + sum(table.nbytes for table in self.tables.values()))

    def _shapes(self, payload_bytes: int) -> dict[str, tuple[np.dtype, int]]:
        tables = {name: (table.dtype, len(table)) for name, table in self.tables.items()}
        return {
            "offsets": (self.offsets.dtype, len(self.offsets)),
            **tables,
            "payload": (np.dtype("u1"), payload_bytes),
        }

    def add(self, row: int, blob: bytes, **values: int) -> None:
        """Rows come in order."""
        self.file.write(blob)
        self.offsets[row + 1] = self.offsets[row] + len(blob)
        for name, value in values.items():
            self.tables[name][row] = value

    def finish(self) -> None:
        self.file.seek(0)
        self.file.write(header_of(self._shapes(int(self.offsets[-1])), self.metadata, self.room))
        for table in (self.offsets, *self.tables.values()):
            self.file.write(table.tobytes())


class Scratch:
    """A vector of zeros in a temporary file.  Raises OSError where there is no room for it: later it would be a crash."""

    def __init__(self, dtype: str, count: int) -> None:
        size = max(1, count) * np.dtype(dtype).itemsize
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)
            self.map = mmap.mmap(file.fileno(), size)
        self.array = np.frombuffer(self.map, dtype, count)

    def release(self) -> None:
        self.map.madvise(mmap.MADV_DONTNEED)


def release(parts: Iterable[Mapped | Scratch]) -> None:
    for part in parts:
        part.release()
