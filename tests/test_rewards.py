"""Rewards against open_clip's own preprocessing and forward pass, and their gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from reward_towers import MODES, PROMPTS, SIZE_PX, random_images, write_folder

import rewards.tower as tower_module
from rewards import REWARDS, Reward
from rewards.preprocess import Preprocess
from rewards.tower import CosineReward


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {name: write_folder(root / name, name) for name in MODES}


@pytest.fixture(scope="module")
def built(folders) -> dict[str, CosineReward]:
    return {name: REWARDS[name](folder) for name, folder in folders.items()}


def photo(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: random patches, so that resampling has both edges and flats to work on."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height_px // 4 + 1, width_px // 4 + 1, 3), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[:height_px, :width_px]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def pil_resize(image: np.ndarray, height_px: int, width_px: int) -> torch.Tensor:
    """PIL's antialiased bicubic in floating point, channel by channel: open_clip's operator without the rounding."""
    planes = [Image.fromarray(image[..., c].astype(np.float32) / 255) for c in range(3)]
    resized = [np.asarray(plane.resize((width_px, height_px), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized))[None]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 80), (100, 37), (32, 20), (13, 32), (9, 17)])
def test_scores_equal_open_clips(name, size, folders, built):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folders[name]}", output_dict=True)
    model.eval()
    image, prompt = photo(*size), PROMPTS[1]
    with torch.no_grad():
        pixels = transform(Image.fromarray(image))[None]
        out = model(pixels, open_clip.get_tokenizer(f"local-dir:{folders[name]}")([prompt]))
        expected = (out["image_features"] * out["text_features"]).sum(-1)
        score = built[name](to_tensor(image), [prompt])
    resampled = max(size) != SIZE_PX if MODES[name] == "longest" else size != (SIZE_PX, SIZE_PX)
    # PIL rounds what it resampled to 8 bits, which no gradient survives; without resampling nothing is rounded.
    torch.testing.assert_close(score, expected, atol=4e-3 if resampled else 1e-5, rtol=0)
    assert score.dtype == torch.float32
    assert score.shape == (1,)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (100, 37), (9, 17)])
def test_pixels_equal_open_clips_without_its_rounding(size, folders):
    image, images = photo(*size), to_tensor(photo(*size))
    normalise = open_clip.transform.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    squashed = open_clip.image_transform(SIZE_PX, is_train=False, resize_mode="squash")(images[0])[None]
    got = Preprocess((SIZE_PX, SIZE_PX), "squash")(images)
    torch.testing.assert_close(got, squashed, atol=1e-5, rtol=0)
    torch.testing.assert_close(got, normalise(pil_resize(image, SIZE_PX, SIZE_PX)), atol=1e-5, rtol=0)
    ratio = max(size) / SIZE_PX
    fitted = pil_resize(image, round(size[0] / ratio), round(size[1] / ratio))
    padded = open_clip.transform.center_crop_or_pad(fitted, [SIZE_PX, SIZE_PX], fill=0)
    got = Preprocess((SIZE_PX, SIZE_PX), "longest")(images)
    torch.testing.assert_close(got, normalise(padded), atol=1e-5, rtol=0)
    cropped = open_clip.image_transform(SIZE_PX, is_train=False, resize_mode="shortest")(images[0])[None]
    torch.testing.assert_close(Preprocess((SIZE_PX, SIZE_PX), "shortest")(images), cropped, atol=1e-5, rtol=0)


def test_padding_equals_squash_for_squares_only():
    longest, squash = (Preprocess((SIZE_PX, SIZE_PX), mode) for mode in ("longest", "squash"))
    assert torch.equal(longest(random_images(2, 50, 50)), squash(random_images(2, 50, 50)))
    assert not torch.allclose(longest(random_images(2, 50, 40)), squash(random_images(2, 50, 40)), atol=0.1)


@pytest.mark.parametrize("name", MODES)
def test_a_score_depends_on_its_own_image_and_prompt_alone(name, folders, built):
    images = random_images(5, 40, 40)
    together = built[name](images, PROMPTS)
    alone = torch.cat([built[name](images[i : i + 1], [PROMPTS[i]]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert together.unique().numel() == 5
    fresh = REWARDS[name](folders[name])  # whatever was encoded before, and in whatever company: bitwise the same
    assert torch.equal(fresh.encode_prompts(PROMPTS[::-1]).flip(0), built[name].encode_prompts(PROMPTS))
    assert torch.equal(fresh(images, PROMPTS), together)


def test_prompt_cache_is_bounded(built, monkeypatch):
    monkeypatch.setattr(tower_module, "MAX_CACHED_PROMPTS", 2)
    reward = built["clip"]
    first = reward.encode_prompts(["a", "b", "c"])
    assert list(reward._features) == ["b", "c"]
    assert torch.equal(reward.encode_prompts(["a", "b", "c"]), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_fp32_and_near(dtype, folders, built):
    reward = REWARDS["hpsv2"](folders["hpsv2"], dtype=dtype)
    images = random_images(2, 40, 24).requires_grad_()
    scores = reward(images, PROMPTS[:2])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, built["hpsv2"](images, PROMPTS[:2]), atol=0.02, rtol=0)
    (grad,) = torch.autograd.grad(scores.sum(), images)
    assert grad.isfinite().all()
    assert grad.any()
    assert {p.dtype for p in reward.model.visual.transformer.parameters()} == {dtype, torch.float32}  # norms stay wide


def test_autocast_around_changes_nothing(built):
    images = random_images(2, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = built["clip"](images, ["never seen before", PROMPTS[0]])
    assert torch.equal(inside, built["clip"](images, ["never seen before", PROMPTS[0]]))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("size", [(32, 32), (48, 30)])
def test_gradient_equals_finite_differences(name, size, folders):
    reward = REWARDS[name](folders[name], dtype=torch.float64)
    images = random_images(2, *size, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)  # a row's gradient must come from its own score
    (grad,) = torch.autograd.grad((weights * reward.scores(images, PROMPTS[:2])).sum(), images)
    for seed in range(3):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            up, down = (weights @ reward.scores(images + h * direction, PROMPTS[:2]) for h in (1e-5, -1e-5))
        torch.testing.assert_close((grad * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


def test_what_evaluation_cached_serves_training(built):
    images = random_images(1, 40, 40)
    with torch.inference_mode():
        expected = built["clip"](images, ["first seen in evaluation"]).clone()
    scores = built["clip"](images.requires_grad_(), ["first seen in evaluation"])
    scores.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(scores.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODES)
def test_checkpointing_keeps_the_gradient(name, folders, built):
    images = random_images(3, 48, 40).requires_grad_()
    checkpointed = REWARDS[name](folders[name], checkpointing=True)
    grads = [torch.autograd.grad(r(images, PROMPTS[:3]).sum(), images)[0] for r in (built[name], checkpointed)]
    assert checkpointed.model.visual.transformer.grad_checkpointing  # told by the last call: they share the tower
    torch.testing.assert_close(*grads, atol=1e-7, rtol=1e-5)
    assert grads[0].abs().max() > 1e-4


@pytest.mark.parametrize("name", MODES)
def test_weights_stay_frozen(name, built):
    reward = built[name]
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable) == (name, True)
    images = random_images(1, 32, 32).requires_grad_()
    reward(images, ["a"], tick=3).backward()
    assert not reward.model.training
    assert all(not p.requires_grad and p.grad is None and not p.is_meta for p in reward.model.parameters())
    with pytest.raises(ValueError, match="1 images need as many prompts"):
        reward(images, ["a", "b"])
    with pytest.raises(ValueError, match="1 images need as many prompts"):
        reward(images, "a")
    with pytest.raises(ValueError, match="3, H, W"):
        reward(images[:, :1], ["a"])


def test_importing_rewards_costs_nothing():
    code = "import sys, rewards; assert not {'torch', 'open_clip'} & set(sys.modules); print(*rewards.REWARDS)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["clip", "hpsv2", "pickscore", "imagereward", "aesthetic"]
