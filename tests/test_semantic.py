"""The semantic-relative reward: what cancels, what remains, which words are drawn."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reward_towers import PROMPTS, random_images, write_folder

from rewards import REWARDS, Reward
from rewards.semantic import NEGATIVE, POSITIVE, SemanticRelative
from rewards.tower import CosineReward


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> CosineReward:
    return REWARDS["hpsv2"](write_folder(tmp_path_factory.mktemp("tower"), "hpsv2"))  # type: ignore[return-value]


def test_it_is_the_difference_of_two_cosines(tower: CosineReward) -> None:
    reward = SemanticRelative(tower, k=0.1, seed=5)
    assert isinstance(reward, Reward)
    images, prompts = random_images(len(PROMPTS), 40, 32), list(PROMPTS)
    towards, away = reward.words(7)
    positive = tower(images, [f"{towards}. {p}" for p in prompts])
    negative = tower(images, [f"{away}. {p}" for p in prompts])
    torch.testing.assert_close(reward(images, prompts, tick=7), 1.1 * positive - negative, rtol=0, atol=1e-6)


def test_what_both_wordings_share_cancels_but_for_k(tower: CosineReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same vector added to both text features moves the score by k times its product with the image."""
    images, prompts = random_images(2, 40, 32), list(PROMPTS[:2])
    encode, width = tower.encode_prompts, tower.encode_prompts(prompts).shape[1]
    moved = 0.3 * torch.nn.functional.normalize(torch.arange(1.0, 1 + width), dim=0)
    for k in (0.0, 0.25):
        reward = SemanticRelative(tower, k=k)
        before = reward(images, prompts)
        monkeypatch.setattr(tower, "encode_prompts", lambda texts: encode(texts) + moved)
        after = reward(images, prompts)
        monkeypatch.undo()
        expected = k * (tower.encode_images(images) * moved).sum(-1)
        torch.testing.assert_close(after - before, expected.float(), rtol=0, atol=1e-6)


def test_words_are_a_function_of_seed_and_tick(tower: CosineReward) -> None:
    reward, again, other = (SemanticRelative(tower, seed=seed) for seed in (1, 1, 2))
    drawn = [reward.words(tick) for tick in range(900)]
    assert drawn == [again.words(tick) for tick in range(900)]
    assert drawn != [other.words(tick) for tick in range(900)]
    counted = Counter(drawn)
    assert set(counted) == {(p, n) for p in POSITIVE for n in NEGATIVE}
    assert max(counted.values()) < 2 * min(counted.values())


@pytest.mark.parametrize("prompts", [["one"], "red", []])
def test_prompts_that_are_not_one_an_image_are_refused(tower: CosineReward, prompts: list[str] | str) -> None:
    """One prompt would be broadcast; the letters of a string would pass for three."""
    with pytest.raises(ValueError, match="3 images need as many prompts"):
        SemanticRelative(tower)(random_images(3, 40, 32), prompts)


def test_gradients_reach_the_pixels(tower: CosineReward) -> None:
    images = random_images(2, 40, 32).requires_grad_()
    SemanticRelative(tower)(images, list(PROMPTS[:2]), tick=3).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0
