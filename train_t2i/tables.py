"""Lines and rows of text files and tables, each with the place where a person finds it.

Readers refuse what they cannot read whole: UserError names the file and the line or row; nothing is skipped silently.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from train_t2i.errors import UserError

PROMPT_COLUMNS = ("prompt", "text", "caption")
MAX_PROMPT_BYTES = 16_000
MAX_LINE_BYTES = 1_000_000  # of a csv or jsonl file, which may hold more columns than the prompt
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # all but the tab
CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]")  # the same in UTF-8
NO_CONTROL = bytes([9, 10, *range(0x20, 0x7F), *range(0x80, 0x100)])
BLOCK_BYTES = 1 << 20


def lines(path: Path, limit: int) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a UTF-8 file, split at \\n and \\r\\n only.  Raises UserError."""
    for number, _, block in sound_blocks(path, limit):
        text = block.decode().removesuffix("\n").removesuffix("\r")
        yield from enumerate(text.replace("\r\n", "\n").split("\n"), number)


def sound_blocks(path: Path, limit: int) -> Iterator[tuple[int, int, bytes]]:
    """(number of its first line, where it starts in the file, bytes) of blocks of whole lines, all of them sound:
    UTF-8, no control characters, none longer than ``limit`` bytes.  Raises UserError for the first that is not."""
    number, start = 1, 0
    with _open(path) as file:
        while block := file.read(BLOCK_BYTES) + file.readline(limit + 3):  # up to the end of a line, if that is near
            if start == 0 and block.startswith(codecs.BOM_UTF8):
                start, block = len(codecs.BOM_UTF8), block.removeprefix(codecs.BOM_UTF8)
            if not _looks_sound(block, limit):  # something is wrong in it, or it ends in a lone \\r: look at each line
                for place, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), number):
                    _line(raw.removesuffix(b"\r"), f"{path}:{place}", limit)
            yield number, start, block
            number, start = number + block.count(b"\n"), start + len(block)


def _looks_sound(block: bytes, limit: int) -> bool:
    """Whether no line of whole megabytes can be refused."""
    block = block.replace(b"\r\n", b"\n").removesuffix(b"\n")
    if max(map(len, block.split(b"\n"))) > limit or block.translate(None, NO_CONTROL):
        return False
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return not re.search(rb"\xc2[\x80-\x9f]", block)


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


def records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, {column: cell}) of a table; of parquet only the columns wanted.  Raises UserError."""
    _open(path).close()
    yield from READERS[path.suffix.lower()](path, wanted)


def _csv(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    text = (line + "\n" for _, line in lines(path, MAX_LINE_BYTES))
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
    for number, line in lines(path, MAX_LINE_BYTES):
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
    raise UserError(f"{place_of(path, number)}: neither an object nor text", 'write {"prompt": "..."}')


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in wanted]
            if not columns:
                raise UserError(f"{path}: no column {', '.join(wanted)}; it has: {short(', '.join(names))}")
            for batch in file.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}, after row {number}: bad parquet: {short(str(error))}", "write the file anew"
        ) from None


READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def place_of(path: Path, number: int) -> str:
    return f"{path}, row {number}" if path.suffix.lower() in (".json", ".parquet") else f"{path}:{number}"


def short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def clean(value: object, name: str, path: Path, number: int) -> str:
    """A cell as one stripped line of text; None is blank."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place_of(path, number)}: {name} is {short(repr(value))}, not text")
    text = re.sub(r"[\r\n\t]+", " ", value).strip()
    if bad := CONTROL.search(text):
        raise UserError(f"{place_of(path, number)}: control character U+{ord(bad[0]):04X} in {name}", "remove it")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(
            f"{place_of(path, number)}: half a surrogate pair in {name}", "write it as valid Unicode"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise UserError(f"{place_of(path, number)}: {name} is longer than {MAX_PROMPT_BYTES} bytes", "shorten it")
    return text


def prompt_of(record: Mapping[str, Any], path: Path, number: int) -> str:
    """The prompt of a row of a table, blank where its cell is.  Raises UserError where it has no such column."""
    name = next((name for name in PROMPT_COLUMNS if name in record), None)
    if name is None:
        raise UserError(
            f"{place_of(path, number)}: no column {', '.join(PROMPT_COLUMNS)}; it has: {short(', '.join(record))}",
            "name the column of the prompts so",
        )
    return clean(record[name], name, path, number)
