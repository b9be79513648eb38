"""Reading a cache: by row, by text, in batches; and what is said of a folder that is damaged or of something else."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import FakeText, flip, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from train_t2i import prompt_cache
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.mapped import Mapped, write_arrays
from train_t2i.packing import STORES, Layout, pack, scales_of, unpack
from train_t2i.prompt_cache import CachedText, PromptCache, check_key, shard_name
from train_t2i.storage import Damaged

TEXTS = [f"prompt {'x' * (i % 7)} {i}" for i in range(30)]


@pytest.fixture(scope="module", params=["masks", "keeps"])
def family(request: pytest.FixtureRequest) -> FakeText:
    return FakeText(masks=True) if request.param == "masks" else FakeText(masks=False, pooled=5, guidance=3.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, family: FakeText) -> Path:
    """30 prompts in shards of 8, encoded one by one."""
    return make_cache(tmp_path_factory.mktemp("cache"), [*TEXTS, TEXTS[3]], family, shard_size=8)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refused(read: object, *words: str) -> UserError:
    with pytest.raises(UserError) as told:
        read()  # type: ignore[operator]
    assert told.value.exit_code == EXIT_USER
    assert all(word in told.value.message for word in words), told.value.message
    assert told.value.hint
    return told.value


# -- one embedding ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(STORES), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(1, 6), st.integers(1, 9),
    st.sampled_from([0, 3]), st.integers(0, 2**31), st.sampled_from([1e-30, 1e-3, 1.0, 300.0]), st.booleans(),
)  # fmt: skip
def test_bytes_and_back(store, dtype, length, width, pooled, seed, size, alike) -> None:
    """native: bit for bit, whatever the bits; bf16: rounded once; fp8: within the bound that packing.py states."""
    generator, kind = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    tokens = torch.randn(length, width, generator=generator)
    if alike:  # rows that are near the one before are written as differences
        tokens = tokens[:1] + torch.randn(length, width, generator=generator) / 500
    tokens = (size * tokens).clamp(-60000, 60000).to(kind)
    tokens[0, 0] = -0.0
    told = torch.randn(pooled, generator=generator).to(kind) if pooled else None
    layout = Layout(store, dtype, width, pooled)
    found, of_pool = unpack(layout, pack(layout, tokens, told), length)
    assert found.dtype == kind
    if store == "native":
        assert torch.equal(found.view(torch.uint8), tokens.view(torch.uint8))
        assert told is None or torch.equal(of_pool, told)
    elif store == "bf16":
        assert torch.equal(found, tokens.bfloat16().to(kind))
        assert told is None or torch.equal(of_pool, told.bfloat16().to(kind))
    else:
        scale = scales_of(tokens)[:, None].double()
        bound = torch.maximum(tokens.double().abs() / 16, scale / 1024)
        rounding = (
            torch.finfo(kind).eps * tokens.double().abs() * 1.1 + torch.finfo(kind).smallest_normal
        )  # back to kind
        assert bool(((found.double() - tokens.double()).abs() <= bound + rounding).all())


def test_neighbours_that_are_alike_cost_half() -> None:
    """Less than half of what they cost without the differences (0.52); rows that are not alike cost nothing more (0.72)."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(400, 256, generator=generator) / 200
    alike = (torch.randn(256, generator=generator) + steps.cumsum(0)).bfloat16()
    other = torch.randn(400, 256, generator=generator).bfloat16()
    layout = Layout("native", "bfloat16", 256, 0)
    sizes = [len(pack(layout, tokens, None)) / tokens.nbytes for tokens in (alike, other)]
    assert sizes[0] < 0.26
    assert sizes[1] < 0.73


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_the_encoders_would_make(folder: Path, family: FakeText) -> None:
    cached = CachedText(family, PromptCache(folder))
    for prompts in (TEXTS[:1], TEXTS[4:9], [TEXTS[20], TEXTS[3], TEXTS[20]]):
        found, rows = cached.encode(prompts, ""), [family.encode([prompt], "") for prompt in prompts]
        for got, made in ((found, rows), (found.negative, [row.negative for row in rows])):
            lengths = [row.tokens.shape[1] for row in made]
            assert got.tokens.shape == (len(prompts), max(lengths), 12)
            for i, (row, length) in enumerate(zip(made, lengths)):
                if family.masks:
                    assert torch.equal(got.tokens[i, :length], row.tokens[0])
                    assert not got.tokens[i, length:].any()
                    assert length == max(lengths) or got.mask[i].tolist() == [j < length for j in range(max(lengths))]
            if family.masks:
                assert (got.mask is None) == (len(set(lengths)) == 1)
                assert got.pooled is None
                assert got.guidance is None
            else:
                assert got.mask is None
                assert torch.equal(got.pooled, torch.cat([row.pooled for row in made]))
                assert got.guidance.tolist() == [3.5] * len(prompts)
    assert cached.encode(TEXTS[:2]).negative is None
    named = cached.encode(TEXTS[:2], TEXTS[7])
    if family.masks:
        assert torch.equal(named.negative.tokens[1], family.row(TEXTS[7])[:16])


def test_rows_and_texts_lead_to_the_same(folder: Path) -> None:
    stored = PromptCache(folder)
    for row in np.random.default_rng(0).permutation(31).tolist():
        text = [*TEXTS, TEXTS[3]][row]
        assert torch.equal(stored[row][0], stored.embedding(text)[0])
    assert stored.find(TEXTS[3]) == 3
    assert stored.find("prompt") is None


def test_everything_else_is_the_familys(folder: Path, family: FakeText) -> None:
    cached = CachedText(family, PromptCache(folder))
    assert cached.text_length == 16
    assert cached.pipe is family.pipe
    assert cached.to(torch.device("cpu")) is cached


def test_few_shards_are_open_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "OPEN_SHARDS", 2)
    stored, before = PromptCache(folder), len(list(Path("/proc/self/fd").iterdir()))
    for row in (0, 9, 17, 25, 1, 2, 26):
        stored[row]
    assert len(stored._shards) == 2
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def resident_kb(path: Path) -> int:
    """Of the maps of a file, as the kernel counts them."""
    parts = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(int(part.split("Rss:")[1].split()[0]) for part in parts)


def test_what_was_read_is_not_kept_in_memory(tmp_path: Path, folder: Path) -> None:
    """Neither of a large file nor of a cache: memory does not grow with what was looked at."""
    write_arrays(tmp_path / "large", {"payload": np.ones(1 << 24, np.uint8)}, {})
    large = Mapped(tmp_path / "large")
    assert int(large.arrays["payload"].sum()) == 1 << 24
    assert resident_kb(tmp_path / "large") > 16_000
    large.release()
    assert resident_kb(tmp_path / "large") == 0
    stored = PromptCache(folder)
    for text in TEXTS:
        stored.embedding(text)
    assert sum(resident_kb(folder / shard_name(shard)) for shard in range(4)) == 0
    stored.need(TEXTS)
    assert resident_kb(folder / "index.safetensors") == 0


def test_a_prompt_that_is_not_there_is_named(folder: Path, family: FakeText) -> None:
    cached = CachedText(family, PromptCache(folder))
    refused(lambda: cached.encode([TEXTS[0], "a horse"]), "1 of 3 prompts", "'a horse'")
    refused(lambda: cached.encode(TEXTS[:1], "ugly"), "'ugly'")
    refused(lambda: cached.cache.embedding("a horse"), "1 of 1 prompts", "'a horse'")


# -- the key ---------------------------------------------------------------------------------------------------------


def test_a_cache_of_something_else_is_refused_by_name(folder: Path) -> None:
    stored = PromptCache(folder)
    then = stored.record["key"]
    assert then["template"] == {"prompt_template_encode": "say {}", "prompt_template_encode_start_idx": 3}
    assert "31, 30 different, stored as native" in check_key(stored, then)
    others = {
        "pipeline": "FluxPipeline", "text_length": 17, "template": {"prompt_template_encode": "{}"}, "dtype": "float16",
        "zeros_for_empty": True,
    }  # fmt: skip
    assert then.keys() == {*others, "encoder"}
    for name, now in others.items():
        assert refused(lambda name=name, now=now: check_key(stored, then | {name: now}), "other settings", name)
    stored.record["key"] = then | {"encoder": "a"}
    refused(lambda: check_key(stored, then | {"encoder": "b"}), "encoder: then 'a', now 'b'")
    assert "not compared, since its files are not here: encoder" in check_key(stored, then)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-1, -40, 600])
def test_a_bit_that_flipped_is_found_where_it_is_read(copy: Path, at: int) -> None:
    """In the payload or in a table: never an embedding that is not the prompt's."""
    whole = PromptCache(copy)
    expected = [whole[row][0] for row in range(31)]
    flip(copy / shard_name(2), at)
    stored = PromptCache(copy)
    errors = [error for row in range(31) if (error := error_of(lambda row=row: same(stored[row], expected[row])))]
    assert all(shard_name(2) in error.message for error in errors)
    assert all("delete that file and run the cache command again" in error.hint for error in errors)
    assert len(errors) == 1 or at == 600


def same(found: tuple, expected: torch.Tensor) -> None:
    assert torch.equal(found[0], expected)


def error_of(read: Callable[[], object]) -> UserError | None:
    try:
        read()
    except UserError as error:
        return error
    return None


def test_a_shard_that_is_cut_off_or_of_another_cache(copy: Path, tmp_path: Path) -> None:
    path = copy / shard_name(1)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:300], b"", b"garbage" * 100, data + b"\0", b"\xff" * 200):
        path.write_bytes(damaged)
        refused(lambda: PromptCache(copy)[9], shard_name(1))
    path.write_bytes((copy / shard_name(0)).read_bytes().replace(b'"cache":"', b'"cache":"x', 1))
    refused(lambda: PromptCache(copy)[9], shard_name(1))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    path.write_bytes(data.replace(header["__metadata__"]["cache"].encode(), b"0" * 32))
    refused(lambda: PromptCache(copy)[9], shard_name(1), "is of another cache")


def with_table(path: Path, name: str, row: int, value: int) -> None:
    """Write another value into a table of a shard."""
    shard = Mapped(path)
    arrays = {key: array.copy() for key, array in shard.arrays.items()}
    arrays[name][row] = value
    write_arrays(path, arrays, shard.metadata)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", 1), ("lengths", 2**31 - 1), ("offsets", 0), ("offsets", -5), ("offsets", 2**40), ("prompts", 3)],
)
def test_a_table_that_lies_is_found(copy: Path, name: str, value: int) -> None:
    with_table(copy / shard_name(1), name, 2, value)
    refused(lambda: PromptCache(copy)[10], shard_name(1), "its entry 2 is damaged")


def test_a_shard_without_a_table_and_shapes_that_lie(copy: Path, tmp_path: Path) -> None:
    shard = Mapped(copy / shard_name(1))
    arrays = {key: array.copy() for key, array in shard.arrays.items() if key != "digests"}
    write_arrays(copy / shard_name(1), arrays, shard.metadata)
    refused(lambda: PromptCache(copy)[10], shard_name(1), "holds no digests")
    write_arrays(tmp_path / "x", {"payload": np.zeros(64, np.uint8)}, {})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes().replace(b'"shape":[64]', b'"shape":[63]'))
    with pytest.raises(Damaged, match="another size than its shape"):
        Mapped(tmp_path / "x")
    (tmp_path / "x").write_bytes(
        (1 << 21).to_bytes(8, "little") + b"{}".ljust(1 << 21)
    )  # garbage may say it is gigabytes
    with pytest.raises(Damaged, match="no header"):
        Mapped(tmp_path / "x")


def test_an_index_that_leads_astray_is_found(copy: Path) -> None:
    """An entry under the wrong text: the shard knows whose it is."""
    path = copy / "index.safetensors"
    entries = Mapped(path).arrays["entries"]
    data, size = path.read_bytes(), entries.nbytes
    turned = np.roll(entries, 1).tobytes()
    path.write_bytes(data[: len(data) - size] + turned)
    refused(lambda: PromptCache(copy).embedding(TEXTS[4]), "index.safetensors", "of another prompt")


def test_shards_under_each_others_names_are_found(copy: Path) -> None:
    (copy / shard_name(0)).rename(copy / "x")
    (copy / shard_name(1)).rename(copy / shard_name(0))
    (copy / "x").rename(copy / shard_name(1))
    refused(lambda: PromptCache(copy)[4], shard_name(0), "another of its files")


@pytest.mark.parametrize("name", ["index.safetensors", "empty.safetensors", shard_name(3)])
def test_a_file_that_is_missing_is_named_at_the_start(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refused(lambda: PromptCache(copy), f"not complete, {name} is missing (1 files in all)")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 1, "shard_size": 8, "key": {}, "prompts": 3}', "\udcff"]
)
def test_a_record_that_cannot_be_used(copy: Path, content: str) -> None:
    (copy / "cache.json").write_bytes(content.encode(errors="surrogateescape"))
    refused(lambda: PromptCache(copy), "cache.json")


def test_records_of_other_caches_and_versions(copy: Path, tmp_path: Path) -> None:
    record = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps(record | {"version": 2}))
    refused(lambda: PromptCache(copy), "newer version")
    record["prompts"]["digest"] = "0"
    (copy / "cache.json").write_text(json.dumps(record))
    refused(lambda: PromptCache(copy), "index.safetensors: is of other prompts")
    refused(lambda: PromptCache(tmp_path), "not a prompt cache")
    refused(lambda: PromptCache(tmp_path / "none"), "not a prompt cache")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 2**64 - 1), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory, content: bytes, size: int, sized: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes((len(content) if sized else size).to_bytes(8, "little") + content)
    with contextlib.suppress(Damaged):
        Mapped(path)
