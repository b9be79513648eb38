"""Numbers for texts, by counting them in a dict: a slow way that nobody can doubt."""

from __future__ import annotations

import numpy as np
import pytest

from train_t2i import prompt_index
from train_t2i.prompt_index import build, halves


@pytest.mark.parametrize("share", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("different", [1, 3, 40, 1000])
def test_texts_are_numbered_as_a_dict_would(monkeypatch: pytest.MonkeyPatch, share: int, different: int) -> None:
    monkeypatch.setattr(prompt_index, "SHARE", share)
    monkeypatch.setattr(prompt_index, "ROWS_AT_ONCE", 7)
    texts = [f"text {i}" for i in np.random.default_rng(different).integers(0, different, 90)]
    index, numbers = build(texts, range(10, 90)), dict[str, int]()
    expected = [numbers.setdefault(text, len(numbers)) for text in texts[10:]]
    assert index.samples.tolist() == expected
    assert index.unique == len(numbers)
    table = {(int(h), int(low)): int(e) for h, low, e in zip(index.high, index.low, index.entries)}
    assert table == {halves(text): entry for text, entry in numbers.items()}
    pairs = list(zip(index.high.tolist(), index.low.tolist()))
    assert pairs == sorted(pairs)
    for size in (1, 4, 100):
        parts = list(index.first_rows(size))
        assert all(len(part) == size for part in parts[:-1])
        assert np.concatenate(parts).tolist() == [expected.index(entry) for entry in range(len(numbers))]


def test_texts_of_one_half_hash_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves count."""
    monkeypatch.setattr(prompt_index, "halves", lambda text: (7, ord(text)))
    index = build(list("abcab"), range(5))
    assert index.samples.tolist() == [0, 1, 2, 0, 1]


def test_the_digest_is_of_the_texts_in_their_order() -> None:
    texts = ["a", "b", "c", "b"]
    digest = build(texts, range(4)).digest
    assert digest == build(["x", *texts], range(1, 5)).digest
    others = (["a", "c", "b", "b"], ["a", "b", "c"], ["a", "b", "c", "c"])
    assert len({digest, *(build(other, range(len(other))).digest for other in others)}) == 4
