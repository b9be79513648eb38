"""Rewards against open_clip's own preprocessing and forward pass, their gradients, and what they do with bad files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file

import rewards.tower as tower_module
from rewards import REWARDS, Reward, RewardError, inspect_weights
from rewards import clip as clip_reward
from rewards import hpsv2 as hps_reward
from rewards.preprocess import Preprocess
from rewards.tower import VIT_H_14, CosineReward, empty_model, resolve
from rewards.weights import read_shapes, read_state

SIZE_PX = 32
MODES = {"clip": "squash", "hpsv2": "longest"}
PROMPTS = ["a red circle", "two small blue squares on a yellow ground", "", "a red circle", "naïve café ☕"]
CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIZE_PX, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}


def write_folder(folder: Path, name: str, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A random small tower of the reward ``name``, as a folder that open_clip itself can load."""
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["quick_gelu"] = name == "clip"
    config["preprocess_cfg"]["resize_mode"] = MODES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if state is None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            state = open_clip.CLIP(**config["model_cfg"]).state_dict()
            for tensor in state.values():  # away from the initial ones, zeros and tiny weights
                tensor += 0.1 * torch.randn_like(tensor)
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


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


def random_images(batch: int, height_px: int, width_px: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(
        batch, 3, height_px, width_px, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).to(dtype)


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
    (grad,) = torch.autograd.grad((weights * reward.cosine(images, PROMPTS[:2])).sum(), images)
    for seed in range(3):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            up, down = (weights @ reward.cosine(images + h * direction, PROMPTS[:2]) for h in (1e-5, -1e-5))
        torch.testing.assert_close((grad * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODES)
def test_checkpointing_keeps_the_gradient(name, folders, built):
    images = random_images(3, 48, 40).requires_grad_()
    checkpointed = REWARDS[name](folders[name], checkpointing=True)
    assert checkpointed.model.visual.transformer.grad_checkpointing
    grads = [torch.autograd.grad(r(images, PROMPTS[:3]).sum(), images)[0] for r in (built[name], checkpointed)]
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


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward_module", [clip_reward, hps_reward])
def test_published_file_is_a_vit_h_14_with_the_right_activation(reward_module, tmp_path):
    quick = reward_module is clip_reward
    published = open_clip.get_model_config("ViT-H-14-quickgelu" if quick else "ViT-H-14")
    assert {**VIT_H_14, "quick_gelu": quick} == {"quick_gelu": False, **published}
    shapes = sparse_vit_h_14(tmp_path / "weights.bin")
    source = resolve(tmp_path / "weights.bin", reward_module.SPEC)
    model = empty_model(source, torch.bfloat16)
    activations = {type(module) for name, module in model.named_modules() if name.endswith("mlp.gelu")}
    assert activations == {QuickGELU if quick else torch.nn.GELU}
    assert all(parameter.is_meta for parameter in model.parameters())
    report = reward_module.inspect(tmp_path / "weights.bin")
    assert (report.quick_gelu, report.num_tensors, report.kind) == (quick, len(shapes), "safetensors")
    assert report.num_parameters == 986_109_441
    assert report.image_size_px == (224, 224)
    assert report.resize_mode == ("squash" if quick else "longest")
    assert "986.1 M" in str(report)


def sparse_vit_h_14(path: Path) -> dict[str, tuple[int, ...]]:
    """A safetensors file with the header of a whole ViT-H-14 in fp16 and a hole of 2 GB where its tensors would be."""
    with torch.device("meta"):
        state = open_clip.CLIP(**VIT_H_14).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["flat.pt", "wrapped.pt", "module.bin", "legacy.pt", "half.safetensors"])
def test_every_form_of_file_gives_the_same_scores(form, folders, built, tmp_path):
    state = read_state(folders["clip"] / "open_clip_model.safetensors")
    folder = write_folder(tmp_path / "tower", "clip", state)
    (folder / "open_clip_model.safetensors").unlink()
    if form == "half.safetensors":
        save_file({name: tensor.half() for name, tensor in state.items()}, folder / form)
    elif form == "module.bin":
        torch.save(
            {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, folder / form
        )
    else:
        content = state if form == "flat.pt" else {"state_dict": state}
        torch.save(content, folder / form, _use_new_zipfile_serialization=form != "legacy.pt")
    assert inspect_weights("clip", folder).num_tensors == len(state)
    assert read_shapes(folder / form) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    images = random_images(2, 40, 40)
    tolerance = 5e-3 if form == "half.safetensors" else 0
    scores = REWARDS["clip"](folder)(images, PROMPTS[:2])
    torch.testing.assert_close(scores, built["clip"](images, PROMPTS[:2]), atol=tolerance, rtol=0)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def damage(kind: str, folder: Path, canary: Path) -> None:
    """Puts the damage ``kind`` into a good folder of a tower."""
    weights = folder / "open_clip_model.safetensors"
    state, good, torch_file = read_state(weights), weights.read_bytes(), folder / "weights.pt"
    if kind in ("truncated torch", "code", "code in an old file", "no state dict", "not a tensor", "torchscript"):
        weights.unlink()
    if kind == "missing":
        weights.unlink()
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "zeros":
        weights.write_bytes(bytes(len(good)))
    elif kind == "web page":
        weights.write_bytes(b"\n<!DOCTYPE html><html><title>Sign in</title></html>")
    elif kind == "lfs pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "garbage":
        weights.write_bytes(bytes(range(256)) * 64)
    elif kind == "truncated":
        weights.write_bytes(good[: len(good) // 2])
    elif kind == "truncated header":
        weights.write_bytes(good[:100])
    elif kind == "truncated torch":
        torch.save({"state_dict": state}, torch_file)
        torch_file.write_bytes(torch_file.read_bytes()[:-5000])
    elif kind in ("code", "code in an old file"):
        content = {"state_dict": {**state, "visual.proj": Payload(canary)}}
        torch.save(content, torch_file, _use_new_zipfile_serialization=kind == "code")
    elif kind == "no state dict":
        torch.save([1, 2, 3], torch_file)
    elif kind == "not a tensor":
        torch.save({**state, "epoch": 3}, torch_file)
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), torch_file)
    elif kind == "wrong shape":
        save_file({**state, "visual.proj": torch.ones(32, 23)}, weights)
    elif kind == "missing tensor":
        save_file({name: tensor for name, tensor in state.items() if name != "ln_final.bias"}, weights)
    elif kind == "extra tensor":
        save_file({**state, "text.extra": torch.ones(2)}, weights)
    elif kind == "nan":
        state["visual.proj"][3, 4] = float("nan")
        save_file(state, weights)
    elif kind == "hole":
        save_file({**state, "visual.proj": torch.zeros_like(state["visual.proj"])}, weights)
    elif kind == "two files":
        shutil.copy(weights, folder / "other.safetensors")
    else:
        raise AssertionError(kind)


DAMAGES = {  # what the message must say
    "missing": "no weights file",
    "empty": "is empty",
    "zeros": "filled with zeros",
    "web page": "web page",
    "lfs pointer": "Git LFS",
    "garbage": "neither safetensors nor a torch file",
    "truncated": "truncated or damaged",
    "truncated header": "truncated or damaged",
    "truncated torch": "truncated or damaged",
    "code": "nothing in it was run",
    "code in an old file": "nothing in it was run",
    "no state dict": "no state dict",
    "not a tensor": "where a tensor should be",
    "torchscript": "nothing in it was run",
    "wrong shape": r"'visual.proj' of shape \[32, 23\] instead of \[32, 24\]",
    "missing tensor": "no tensor 'ln_final.bias'",
    "extra tensor": "'text.extra' that does not belong",
    "nan": "NaN or infinity in 'visual.proj'",
    "hole": "nothing but zeros in 'visual.proj'",
    "two files": "several weights files",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_give_one_line(kind, folders, tmp_path):
    folder = tmp_path / "tower"
    shutil.copytree(folders["clip"], folder)
    damage(kind, folder, tmp_path / "canary")
    checks = [REWARDS["clip"]] if kind in ("nan", "hole") else [REWARDS["clip"], REWARDS["clip"].inspect]
    for check in checks:
        with pytest.raises(RewardError, match=DAMAGES[kind]) as caught:
            check(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(caught.value.hint) > 10
        assert caught.value.__cause__ is None
    assert not (tmp_path / "canary").exists()


def test_a_file_of_another_architecture_is_named_as_such(folders, tmp_path):
    with pytest.raises(RewardError, match=r"open_clip_model\.safetensors: .* not the ViT-H-14 \(224 px\)"):
        inspect_weights("hpsv2", folders["hpsv2"] / "open_clip_model.safetensors")
    with pytest.raises(RewardError, match="no such file"):
        inspect_weights("hpsv2", tmp_path / "absent.pt")


CONFIG_DAMAGES = [
    (b"{", "cannot be read as JSON"),
    (b"[]", "no model_cfg"),
    (b"\xff\xfe", "cannot be read as JSON"),
    ({"text_cfg": {"vocab_size": 1000}}, "vocab_size 1000"),
    ({"text_cfg": {"hf_model_name": "org/name"}}, "hf_model_name"),
    ({"vision_cfg": {"timm_model_name": "name"}}, "timm_model_name"),
    ({"vision_cfg": {"wdith": 3}}, "no tower that open_clip can build"),
    ({"vision_cfg": {"head_width": 0}}, "no tower that open_clip can build"),
    ({"vision_cfg": {"image_size": [1, 2, 3]}}, "image_size out of order"),
    ({"preprocess_cfg": {"resize_mode": "stretch"}}, "out of order"),
    ({"preprocess_cfg": {"mean": [1, 2]}}, "3 values"),
    (None, "no such file"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_DAMAGES)
def test_damaged_config_gives_one_line(change, message, folders, tmp_path):
    folder = tmp_path / "tower"
    shutil.copytree(folders["clip"], folder)
    path = folder / "open_clip_config.json"
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        config = json.loads(path.read_text())
        for part, values in change.items():
            (config if part == "preprocess_cfg" else config["model_cfg"])[part].update(values)
        path.write_text(json.dumps(config))
    with pytest.raises(RewardError, match=message) as caught:
        inspect_weights("clip", folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_rewards_costs_nothing():
    code = "import sys, rewards; assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules); print(*rewards.REWARDS)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["clip", "hpsv2"]
