"""A folder of prompt embeddings: written shard by shard by ``python -m train_t2i cache``, read at random by training.

    cache.json                what it was made with (``KEY``) and from (``PROMPTS``)
    index.safetensors         prompt_index.py: row of the data -> entry, hash of a text -> entry
    shard-00000.safetensors   entries 0 ... S - 1, one for every different prompt, then those of the next shard
    empty.safetensors         two entries: the empty prompt, and what guidance moves away from where no text is given

A shard holds ``payload`` (packing.py) and for each entry ``offsets`` in it, ``lengths`` in tokens, ``prompts`` (the low half
of the text's hash) and ``digests`` (of its bytes and length, seeded with that).  Every read checks them.
Shapes: B prompts; L tokens of width D; P pooled width.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, Source
from train_t2i.mapped import Mapped, ShardWriter
from train_t2i.packing import Layout, pack, unpack
from train_t2i.prompt_index import StoredIndex, halves
from train_t2i.storage import Damaged

VERSION = 1
RECORD, INDEX, EMPTY = "cache.json", "index.safetensors", "empty.safetensors"
KEY, PROMPTS = "key", "prompts"
TABLES: dict[str, np.dtype[Any]] = {"lengths": np.dtype("<i4"), "prompts": np.dtype("<u8"), "digests": np.dtype("<u8")}
OPEN_SHARDS = 128  # maps at once: each holds a descriptor
REPAIR = "delete that file and run the cache command again: it makes what is missing"
Embedding = tuple[Tensor, Tensor | None]  # tokens (L, D), pooled (P,)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def digest_of(blob: bytes, length: int, prompt: int) -> int:
    digest = xxhash.xxh3_64(blob, seed=prompt)
    digest.update(length.to_bytes(4, "little"))
    return digest.intdigest()


def write_entry(writer: ShardWriter, row: int, layout: Layout, text: str, embedding: Embedding) -> int:
    """Add an embedding; its bytes."""
    tokens, pooled = embedding
    blob, prompt = pack(layout, tokens, pooled), halves(text)[1]
    writer.add(row, blob, lengths=len(tokens), prompts=prompt, digests=digest_of(blob, len(tokens), prompt))
    return len(blob)


# ==== reading =======================================================================================================


class PromptCache:
    """Embeddings by row of the data (``cache[i]``) or by text (``find``, ``encode``).  Everything is mapped.

    Raises UserError for a folder that is no cache, is not complete or is damaged; reads no embedding.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.record = read_record(self.folder)
        self.shard_size, self.unique = int(self.record["shard_size"]), int(self.record[PROMPTS]["unique"])
        if missing := missing_files(self.folder, self.record):
            raise UserError(
                f"--prompt-cache {folder}: not complete, {missing[0]} is missing ({len(missing)} files in all)",
                "run the cache command again: it makes what is missing",
            )
        self._shards: OrderedDict[str, Mapped] = OrderedDict()
        with told_of_damage():
            self.index = StoredIndex(self.folder / INDEX, self.record[PROMPTS]["digest"], self.unique)
            self.layout = layout_of(self._shard(EMPTY))

    @property
    def max_size(self) -> int:
        """How many of the last prompts of the data are here; 0: all."""
        return int(self.record[PROMPTS]["max_size"])

    def __len__(self) -> int:
        """Prompts, duplicates counted."""
        return len(self.index)

    def __getitem__(self, row: int) -> Embedding:
        """The embedding of a row of the data, in the order of its file."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        with told_of_damage():
            entry = self.index.entry_of(row)
        return self.read(entry)

    def find(self, text: str) -> int | None:
        """The entry of a text."""
        with told_of_damage():
            return self.index.find(text)

    def need(self, texts: Sequence[str]) -> None:
        """Raise a UserError that names the first text that is not here."""
        missing = [text for text in texts if text and self.find(text) is None]
        self.index.release()
        if missing:
            raise self._absent(missing, len(texts))

    def _absent(self, missing: Sequence[str], of: int) -> UserError:
        with told_of_damage():
            self.index.check()  # before its reader is told that it was never there
        return UserError(
            f"--prompt-cache {self.folder}: {len(missing)} of {of} prompts are not in it, first {missing[0][:200]!r}",
            "make a cache that holds them: the cache command takes several files (--data-path-train A,B)",
        )

    def embedding(self, text: str) -> Embedding:
        """(tokens (L, D), pooled (P,)) of a text; it must be here."""
        if not text:
            return self._read(EMPTY, 0, None)
        entry = self.find(text)
        if entry is None:
            raise self._absent([text], 1)
        return self.read(entry, halves(text)[1])

    def negative(self) -> Embedding:
        """What guidance moves away from where no text is given."""
        return self._read(EMPTY, 1, None)

    def read(self, entry: int, prompt: int | None = None) -> Embedding:
        """An entry; ``prompt`` is the low half of the hash of the text that it must belong to."""
        return self._read(shard_name(entry // self.shard_size), entry % self.shard_size, prompt)

    def _read(self, name: str, row: int, prompt: int | None) -> Embedding:
        with told_of_damage():
            shard = self._shard(name)
            arrays = shard.arrays
            if row >= len(arrays["lengths"]):
                raise Damaged(f"{shard.path}: holds no entry {row}")
            length, owner = int(arrays["lengths"][row]), int(arrays["prompts"][row])
            first, last = int(arrays["offsets"][row]), int(arrays["offsets"][row + 1])
            blob = arrays["payload"][first:last].tobytes()
            sound = length >= 0 and int(arrays["digests"][row]) == digest_of(blob, length, owner)
            shard.release()
            if not sound:
                raise Damaged(f"{shard.path}: its entry {row} is damaged")
            if prompt not in (None, owner):
                raise Damaged(f"{self.index.path} or {shard.path}: entry {row} is of another prompt")
            try:
                return unpack(self.layout, blob, length)
            except (OSError, ValueError):  # its bytes are sound
                raise Damaged(f"{shard.path}: its entries are of another layout than it says") from None

    def _shard(self, name: str) -> Mapped:
        if name not in self._shards:
            shard = Mapped(self.folder / name)
            if shard.metadata.get("cache") != cache_digest(self.record) or shard.metadata.get("name") != name:
                raise Damaged(f"{shard.path}: is of another cache, or another of its files")
            if name != EMPTY and layout_of(shard) != self.layout:
                raise Damaged(f"{self.folder / EMPTY} or {shard.path}: they say different layouts")
            count = shard.arrays["lengths"].size if "lengths" in shard.arrays else 0
            tables = {table: (dtype, count) for table, dtype in TABLES.items()}
            shard.require({**tables, "offsets": (np.dtype("<i8"), count + 1), "payload": (np.dtype("u1"), None)})
            self._shards[name] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(name)
        return self._shards[name]


@contextmanager
def told_of_damage() -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise UserError(str(error), REPAIR) from None


def read_record(folder: Path) -> dict[str, Any]:
    """What is in cache.json.  Raises UserError."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--prompt-cache {folder}: not a prompt cache (no {RECORD})",
            "make one: python -m train_t2i cache --out DIR",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "make the cache in another --out") from None
    told = {"version": int, "shard_size": int, KEY: dict, PROMPTS: dict}
    of_prompts = {"unique": int, "digest": str, "max_size": int}
    if not (_holds(record, told) and _holds(record[PROMPTS], of_prompts) and record["shard_size"] > 0):
        raise UserError(f"{path}: not the record of a prompt cache", "make the cache in another --out")
    if record["version"] > VERSION:
        raise UserError(f"{path}: written by a newer version of this toolkit", "update the toolkit")
    return record


def _holds(value: Any, wanted: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in wanted.items())


def check_key(cache: PromptCache, now: Mapping[str, Any]) -> str:
    """Refuse a cache that was made with anything else than this run's (``text_key``, and the encoder's dtype).

    Returns a line that says what was compared.  Where the encoders' files are not here, their digest cannot be.
    """
    then = cache.record[KEY]
    unknown = [name for name in now if now[name] is None or then.get(name) is None]
    changed = [name for name in now if name not in unknown and then[name] != now[name]]
    if changed:
        told = "; ".join(f"{name}: then {_brief(then[name])}, now {_brief(now[name])}" for name in changed)
        raise UserError(
            f"--prompt-cache {cache.folder}: made with other settings ({told})",
            "make a cache with this run's --pretrained-model, --text-length and --mixed-precision, or set them as they were",
        )
    line = f"prompts from {cache.folder}: {len(cache)}, {cache.unique} different, stored as {cache.layout.store}"
    return line + (f"; not compared, since its files are not here: {', '.join(unknown)}" if unknown else "")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def missing_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    there = {entry.name for entry in os.scandir(folder)}
    shards = -(-int(record[PROMPTS]["unique"]) // int(record["shard_size"]))
    return [name for name in (INDEX, EMPTY, *map(shard_name, range(shards))) if name not in there]


def cache_digest(record: Mapping[str, Any]) -> str:
    """Ties a shard to all that decides its bytes."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def layout_of(shard: Mapped) -> Layout:
    """Raises Damaged."""
    try:
        layout = Layout(**json.loads(shard.metadata["layout"]))
        if layout.sound:
            return layout
    except (KeyError, ValueError, TypeError):
        pass  # as one that cannot be
    raise Damaged(f"{shard.path}: does not say what its embeddings are")


# ==== in place of text encoders =====================================================================================


class CachedText:
    """A family whose text encoders are not loaded: what they would say comes from a cache; the rest is the family's."""

    def __init__(self, family: Any, cache: PromptCache) -> None:
        self.family, self.cache, self.compared = family, cache, ""
        self.device = torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def to(self, device: torch.device) -> CachedText:
        self.family.to(device)
        self.device = device
        return self

    def encode(
        self, prompts: Sequence[str], negative: str | None = None, sources: Sequence[Sequence[Source]] = ()
    ) -> Cond:
        """As the family's, which has no sources.  Raises UserError for a prompt that is not in the cache."""
        self.cache.need([*prompts, negative or ""])
        found = [self.cache.embedding(prompt) for prompt in prompts]
        cond = self.family.complete(self._cond(found))
        if negative is None:
            return cond
        away = self.cache.embedding(negative) if negative else self.cache.negative()
        return replace(cond, negative=self.family.complete(self._cond([away]).expand(len(prompts))))

    def _cond(self, found: Sequence[Embedding]) -> Cond:
        """Rows of unequal length are filled up with zeros, which the mask hides."""
        lengths = torch.tensor([len(tokens) for tokens, _ in found])
        tokens = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in found], batch_first=True)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        pooled = [part for _, part in found if part is not None]
        return Cond(
            tokens.to(self.device, non_blocking=True),
            torch.stack(pooled).to(self.device, non_blocking=True) if pooled else None,
            None if bool(mask.all()) else mask.to(self.device, non_blocking=True),
        )
