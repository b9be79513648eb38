"""A small cache in which every byte is damaged, one after the other: never another embedding, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import FakeText, flip, make_cache

from train_t2i.errors import UserError
from train_t2i.mapped import Mapped, write_arrays
from train_t2i.prompt_cache import EMPTY, INDEX, RECORD, CachedText, Embedding, PromptCache, shard_name

TEXTS = [f"p{i}" for i in range(10)]
ROWS = [*TEXTS, TEXTS[3]]
SHARD = shard_name(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 prompts, one of them twice, in shards of 4."""
    return make_cache(tmp_path_factory.mktemp("damage"), ROWS, FakeText(masks=True, pooled=3, width=4), shard_size=4)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def reads(cache: PromptCache, name: str) -> Iterator[Callable[[], Embedding]]:
    """All that a file has a part in: of the index all texts and rows."""
    texts, rows = {INDEX: (TEXTS, ROWS), EMPTY: (["", TEXTS[0]], []), RECORD: (TEXTS[:1], []), SHARD: ([], ROWS[:4])}[
        name
    ]
    yield cache.negative
    for text in texts:
        yield lambda text=text: cache.embedding(text)
    for row in range(len(rows)):
        yield lambda row=row: cache[row]


def same(found: Embedding, expected: Embedding) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def refusals(folder: Path, name: str, expected: list[Embedding]) -> list[UserError]:
    """Open the cache and read what the file has a part in; what was refused.  Whatever was not is right."""
    errors: list[UserError] = []
    try:
        cache = PromptCache(folder)
        assert len(cache) == len(ROWS)
    except UserError as error:
        return [error]
    for read, embedding in zip(reads(cache, name), expected, strict=True):
        try:
            assert same(read(), embedding)
        except UserError as error:
            errors.append(error)
    return errors


@pytest.mark.parametrize("name", [EMPTY, INDEX, SHARD, RECORD])
def test_any_bit_that_flips_is_refused_or_does_no_harm(copy: Path, name: str) -> None:
    """In each byte one bit, another from byte to byte; the file is named, but where others are found not to fit its record."""
    expected = [read() for read in reads(PromptCache(copy), name)]
    path, harmless = copy / name, 0
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        errors = refusals(copy, name, expected)
        harmless += not errors
        assert name == RECORD or all(name in error.message for error in errors), (at, errors)
    assert harmless < len(data) / 4


def refused(read: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as told:
        read()
    assert all(word in told.value.message for word in words), told.value.message
    assert "delete that file and run the cache command again" in told.value.hint


def rewritten(path: Path, *, drop: str = "", metadata: dict[str, str] | None = None, **vectors: np.ndarray) -> None:
    """The file as a program would write it that is wrong, not a disk."""
    file = Mapped(path)
    arrays = {name: vectors.get(name, array.copy()) for name, array in file.arrays.items() if name != drop}
    write_arrays(path, arrays, {**file.metadata, **(metadata or {})})


@pytest.mark.parametrize(
    "layout",
    [
        {"store": "fp4"}, {"store": []}, {"dtype": "gloat32"}, {"dtype": "int8"}, {"dtype": "__name__"}, {"width": 0},
        {"width": -4}, {"width": 1.5}, {"width": "4"}, {"width": 10**30}, {"pooled": -1}, {"pooled": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be(copy: Path, layout: dict[str, object]) -> None:
    then = json.loads(Mapped(copy / EMPTY).metadata["layout"])
    rewritten(copy / EMPTY, metadata={"layout": json.dumps(then | layout)})
    refused(lambda: PromptCache(copy), EMPTY, "does not say what its embeddings are")


@pytest.mark.parametrize("layout", [{"width": 5}, {"width": 1}, {"pooled": 0}, {"store": "fp8"}, {"dtype": "float16"}])
def test_a_layout_that_is_anothers(copy: Path, layout: dict[str, object]) -> None:
    """Also one of which the bytes have the size: fp8 with scales in place of four numbers."""
    then = json.loads(Mapped(copy / EMPTY).metadata["layout"])
    rewritten(copy / EMPTY, metadata={"layout": json.dumps(then | layout)})
    refused(lambda: PromptCache(copy)[0], f"{EMPTY} or ", f"{SHARD}: they say different layouts")
    if layout.keys() & {"width", "pooled"}:
        refused(lambda: PromptCache(copy).negative(), f"{EMPTY}: its entries are of another layout than it says")


def test_an_index_that_leads_out_of_the_cache_or_into_none(copy: Path, whole: Path) -> None:
    """Whatever its tables say, and also where it is of a version that noted no digest of them."""
    good = Mapped(whole / INDEX)
    beyond, high = np.full(10, 10, "<u4"), good.arrays["high"].copy()
    rewritten(copy / INDEX, entries=beyond)
    refused(lambda: PromptCache(copy).embedding("p0"), INDEX, "leads to entry 10 of 10")
    rewritten(copy / INDEX, entries=good.arrays["entries"], high=high + np.uint64(1))
    refused(lambda: PromptCache(copy).need(["p0"]), f"{INDEX}: is damaged")
    turned = np.roll(good.arrays["samples"], 1)
    rewritten(copy / INDEX, high=high, samples=turned)
    refused(lambda: PromptCache(copy)[0], f"{INDEX}: is damaged")
    write_arrays(copy / INDEX, good.arrays | {"samples": turned}, {"digest": good.metadata["digest"]})
    assert same(PromptCache(copy)[1], PromptCache(whole)[0])


def test_tables_of_another_type_or_number(copy: Path, whole: Path) -> None:
    for name, vector in (("high", np.zeros(9, "<u8")), ("low", np.zeros(10, "<u4")), ("entries", np.zeros(11, "<u4"))):
        rewritten(copy / INDEX, **{name: vector})
        refused(lambda: PromptCache(copy), f"{INDEX}: its {name} are of another type or number")
        shutil.copy(whole / INDEX, copy / INDEX)
    data = (copy / INDEX).read_bytes()
    (copy / INDEX).write_bytes(data.replace(b'"shape":[10],', b'"shape":[10,1],', 1).replace(b"}}  ", b"}}", 1))
    refused(lambda: PromptCache(copy), f"{INDEX}: its high are of another type or number")
    shutil.copy(whole / INDEX, copy / INDEX)
    rewritten(copy / INDEX, drop="low")
    refused(lambda: PromptCache(copy), f"{INDEX}: holds no low")
    shutil.copy(whole / INDEX, copy / INDEX)
    for name, vector in (
        ("lengths", np.zeros(4, "<i8")),
        ("prompts", np.zeros(3, "<u8")),
        ("offsets", np.zeros(4, "<i8")),
    ):
        rewritten(copy / SHARD, **{name: vector})
        refused(lambda: PromptCache(copy)[0], f"{SHARD}: its {name} are of another type or number")
        shutil.copy(whole / SHARD, copy / SHARD)


def test_a_shard_of_fewer_entries_and_a_length_below_zero(copy: Path) -> None:
    arrays = Mapped(copy / SHARD).arrays
    lengths = arrays["lengths"].copy()
    lengths[1] = -1
    rewritten(copy / SHARD, lengths=lengths)
    refused(lambda: PromptCache(copy)[1], f"{SHARD}: its entry 1 is damaged")
    fewer = {name: array[:2] for name, array in arrays.items() if name in ("lengths", "prompts", "digests")}
    rewritten(copy / SHARD, **fewer, offsets=arrays["offsets"][:3])
    refused(lambda: PromptCache(copy)[3], f"{SHARD}: holds no entry 3")


ONE = b'"dtype": "U8", "shape": [%d], "data_offsets": [0, 1]'


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"__metadata__": [], "a": {%b}}' % (ONE % 1), b'{"a": {%b}}' % (ONE % 10**30)],
    ids=["deep", "no metadata", "huge"],
)
def test_headers_that_make_parsers_fail(copy: Path, header: bytes) -> None:
    (copy / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    refused(lambda: PromptCache(copy)[0], f"{SHARD}: is not whole")


@pytest.mark.parametrize(
    "change",
    [{"shard_size": 0}, {"shard_size": -4}, {"prompts": {}}, {"prompts": {"unique": 10, "digest": 3, "max_size": 0}}],
)
def test_a_record_that_holds_too_little(copy: Path, change: dict[str, object]) -> None:
    record = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=r"cache\.json: not the record of a prompt cache"):
        PromptCache(copy)


def test_training_is_told_as_well(copy: Path) -> None:
    flip(copy / EMPTY, 100)
    with pytest.raises(UserError, match=EMPTY):
        CachedText(FakeText(masks=True), PromptCache(copy)).encode(["p1"], "")
