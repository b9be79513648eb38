"""Prompts by row, kept on the disk: text files are read where they lie, other formats are copied once to a temporary file.

Millions of lines open in seconds, and memory does not grow with them: only where each prompt starts and ends is noted, in a
temporary file of 10 bytes a prompt.  What cannot be used is a UserError that names the file and the line or row.
"""

from __future__ import annotations

import bisect
import errno
import glob
import logging
import os
import struct
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import xxhash
from tqdm import tqdm

from train_t2i import hub
from train_t2i.distinct import distinct
from train_t2i.errors import EXIT_DISK, UserError
from train_t2i.tables import MAX_PROMPT_BYTES, PROMPT_COLUMNS, READERS, prompt_of, records, sound_blocks

BOUNDS = np.dtype([("start", "<i8"), ("length", "<u2")])
ROWS_AT_ONCE = 1 << 14
SLOW_S = 5.0  # from here on a progress bar is shown
SUFFIXES = (".txt", *READERS)
log = logging.getLogger(__name__)

# Bytes at which the first or last character of a line may be blank: such lines are stripped one by one.
_BLANKS = [chr(i).encode() for i in range(0x3001) if chr(i).isspace()]
MAY_BEGIN_BLANK, MAY_END_BLANK = np.zeros(256, bool), np.zeros(256, bool)
MAY_BEGIN_BLANK[[blank[0] for blank in _BLANKS]] = True
MAY_END_BLANK[[blank[-1] for blank in _BLANKS]] = True


class PromptStore(Sequence[str]):
    """The prompts of one or several files, in their order, none of them blank."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.ends = list(accumulate(part.count for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        index = row + len(self) if row < 0 else row
        if not 0 <= index < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect.bisect_right(self.ends, index)
        part = self.parts[number]
        return part.read(index - self.ends[number] + part.count)


class Part:
    """The prompts of one file.  Read, not mapped: a file that shrinks under a map kills its reader without a word."""

    def __init__(self, name: str, file: BinaryIO, bounds: BinaryIO) -> None:
        """``file`` is UTF-8, ``bounds`` where in it each prompt lies, as BOUNDS; copies of their descriptors are kept."""
        self.name = name
        self.text, self.bounds = os.dup(file.fileno()), os.dup(bounds.fileno())
        for descriptor in (self.text, self.bounds):
            weakref.finalize(self, os.close, descriptor)
        self.count = os.fstat(self.bounds).st_size // BOUNDS.itemsize
        self.stamp = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        """(bytes, time of the last change)."""
        status = os.fstat(self.text)
        return status.st_size, status.st_mtime_ns

    def read(self, row: int) -> str:
        start, length = struct.unpack("<qH", os.pread(self.bounds, BOUNDS.itemsize, row * BOUNDS.itemsize))
        raw = os.pread(self.text, length, start)
        if self._stamp() != self.stamp:
            raise UserError(f"{self.name} was changed while it was in use", "leave it alone and start again")
        return raw.decode()


def load_prompts(source: str | os.PathLike[str]) -> PromptStore:
    """The prompts of ``source``: a file, several with commas between them, a glob, a folder of files, or a hub dataset.

    .csv, .tsv, .jsonl, .json, .parquet: the column prompt, text or caption; any other file: one prompt a line.  Globs and
    folders are read in the order of their names.  Blank prompts are dropped and duplicates kept, both counted in the log.
    Raises UserError.
    """
    parts: list[Part] = []
    for place in places(os.fspath(source)):
        try:
            parts.append(_part_of(place))
        except OSError as error:
            raise _unread(place, error) from None
    return PromptStore(parts)


def _unread(place: object, error: OSError) -> UserError:
    many = error.errno in (errno.EMFILE, errno.ENFILE)
    hint = "join the files into fewer, or allow more at once: ulimit -n" if many else "check the path and its disk"
    return UserError(f"{place}: cannot be read ({error.strerror})", hint)


@contextmanager
def _told_of_no_room(place: object) -> Iterator[None]:
    """Around what is written to the temporary folder.  Raises UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError(
            f"{place}: its index cannot be written to {tempfile.gettempdir()} ({error.strerror})",
            "make room there, or set TMPDIR to a folder that has some",
            EXIT_DISK,
        ) from None


def places(source: str) -> list[Path | hub.Dataset]:
    """What a source names, in order.  Raises UserError where it names nothing."""
    path = Path(source)
    if os.path.isdir(source):  # noqa: PTH112 - pathlib raises where a name is too long, as a list of many files is
        try:
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        except OSError as error:
            raise _unread(path, error) from None
        if not found:
            raise UserError(f"{path} is a folder without prompts", f"it may hold files of {', '.join(SUFFIXES)}")
        return [*found]
    if os.path.exists(source):  # noqa: PTH110 - as above
        return [path]
    if source.startswith(hub.PREFIX):
        return [hub.Dataset.parse(source)]
    if "," in source:
        return [place for part in source.split(",") if part.strip() for place in places(part.strip())]
    if any(letter in source for letter in "*?["):
        if not (names := sorted(glob.glob(source, recursive=True))):  # noqa: PTH207 - pathlib takes no absolute ones
            raise UserError(f"{source}: no file of such a name", "check the path")
        return [Path(name) for name in names]
    return [hub.Dataset.parse(source)] if hub.looks_like_one(source) else [path]


# ---------------------------------------------------------------- one file


def _part_of(place: Path | hub.Dataset) -> Part:
    with _Notes(place) as notes, ExitStack() as stack:
        if isinstance(place, Path) and place.suffix.lower() not in READERS:
            _scan(place, notes)
            file: Any = stack.enter_context(place.open("rb"))
        else:
            file = _temporary(place)
            stack.callback(_close, file)
            _spool(place, file, notes)
        if not notes.count:
            raise UserError(
                f"{place} holds no prompt, only {notes.blank} blank lines or rows", "put one prompt on each line"
            )
        double = notes.count - distinct(notes.hashes, notes.count)
        log.info("%s: %d prompts, %d duplicates kept, %d blank dropped", place, notes.count, double, notes.blank)
        return Part(str(place), file, notes.bounds)


def _temporary(place: object) -> BinaryIO:
    with _told_of_no_room(place):
        return tempfile.TemporaryFile()


def _close(file: BinaryIO) -> None:
    """Also what cannot be written any more: it was told already."""
    with suppress(OSError):
        file.close()


class _Notes:
    """Where the prompts of a file lie, and their hashes, in temporary files; counts."""

    def __init__(self, place: object) -> None:
        self.place, self.bounds, self.hashes = place, _temporary(place), _temporary(place)
        self.count = self.blank = 0

    def __enter__(self) -> _Notes:
        return self

    def __exit__(self, *_: object) -> None:
        _close(self.bounds)
        _close(self.hashes)

    def add(self, starts: np.ndarray, lengths: np.ndarray, hashes: Iterable[int]) -> None:
        """All of a block's lines, blank ones with a length of 0; ``hashes`` of the others."""
        there = lengths > 0
        bounds = np.empty(int(there.sum()), BOUNDS)
        bounds["start"], bounds["length"] = starts[there], lengths[there]
        self.count += len(bounds)
        self.blank += len(lengths) - len(bounds)
        with _told_of_no_room(self.place):
            self.bounds.write(bounds.tobytes())
            self.hashes.write(np.fromiter(hashes, np.uint64, len(bounds)).tobytes())
            self.bounds.flush()
            self.hashes.flush()


def _scan(path: Path, notes: _Notes) -> None:
    """Note the lines of a text file, which is read where it lies."""
    blocks = sound_blocks(path, MAX_PROMPT_BYTES)
    with tqdm(desc=str(path), unit="line", delay=SLOW_S, leave=False) as bar:
        for _, start, block in blocks:
            firsts, lasts = stripped_lines(block)
            found = map(
                block.__getitem__, map(slice, firsts.tolist(), lasts.tolist())
            )  # the loop is C's: there are millions
            notes.add(firsts + start, lasts - firsts, map(xxhash.xxh3_64_intdigest, filter(None, found)))
            bar.update(len(firsts))


def stripped_lines(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(first byte, byte after the last) of every line of a block without the blank at its ends, as str.strip has it."""
    data = np.frombuffer(block, np.uint8)
    lasts = np.flatnonzero(data == 10)
    if not block.endswith(b"\n"):
        lasts = np.append(lasts, len(block))
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    if not len(data):
        return firsts, lasts
    lasts = np.where((lasts > firsts) & (data[lasts - 1] == 13), lasts - 1, lasts)
    first_byte, last_byte = data[np.minimum(firsts, len(data) - 1)], data[lasts - 1]
    doubtful = (lasts > firsts) & (MAY_BEGIN_BLANK[first_byte] | MAY_END_BLANK[last_byte])
    for i in np.flatnonzero(doubtful).tolist():
        text = block[firsts[i] : lasts[i]].decode()
        firsts[i] += len(text.encode()) - len(text.lstrip().encode())
        lasts[i] = firsts[i] + len(text.strip().encode())
    return firsts, lasts


def _spool(place: Path | hub.Dataset, file: BinaryIO, notes: _Notes) -> None:
    """Copy the prompts of a table or a hub dataset to a temporary file."""
    if isinstance(place, Path):
        rows = records(place, PROMPT_COLUMNS)
        prompts: Iterable[str] = (prompt_of(record, place, number) for number, record in rows)
    else:
        prompts = hub.prompts(place)
    start = 0
    with tqdm(desc=str(place), unit="row", delay=SLOW_S, leave=False) as bar:
        for chunk in _chunks(prompts):
            encoded = [prompt.encode() for prompt in chunk]
            with _told_of_no_room(place):
                file.write(b"".join(encoded))
            lengths = np.array([len(raw) for raw in encoded], np.int64)
            starts = start + np.cumsum(lengths) - lengths
            notes.add(starts, lengths, (xxhash.xxh3_64_intdigest(raw) for raw in encoded if raw))
            start += int(lengths.sum())
            bar.update(len(chunk))
    with _told_of_no_room(place):
        file.flush()


def _chunks(prompts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for prompt in prompts:
        chunk.append(prompt)
        if len(chunk) == ROWS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
