"""What rewards do with the files they are given: every published form; every damage in one line, no code run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from reward_towers import PROMPTS, random_images, write_folder
from safetensors.torch import save_file

from rewards import REWARDS, RewardError
from rewards import clip as clip_reward
from rewards import hpsv2 as hps_reward
from rewards.tower import VIT_H_14, empty_model, resolve
from rewards.weights import read_shapes, read_state


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("towers") / "clip", "clip")


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
    assert (report.num_tensors, report.kind) == (len(shapes), "safetensors")
    assert report.choices["activation"] == ("QuickGELU" if quick else "GELU")
    assert report.num_parameters == 986_109_441
    assert report.image_size_px == (224, 224)
    assert report.choices["resize"] == ("squash" if quick else "longest")
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
def test_every_form_of_file_gives_the_same_scores(form, good_folder, tmp_path):
    state = read_state(good_folder / "open_clip_model.safetensors")
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
    assert REWARDS["clip"].inspect(folder).num_tensors == len(state)
    assert read_shapes(folder / form) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    images = random_images(2, 40, 40)
    tolerance = 5e-3 if form == "half.safetensors" else 0
    scores = REWARDS["clip"](folder)(images, PROMPTS[:2])
    torch.testing.assert_close(scores, REWARDS["clip"](good_folder)(images, PROMPTS[:2]), atol=tolerance, rtol=0)


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
def test_damaged_weights_give_one_line(kind, good_folder, tmp_path):
    folder = tmp_path / "tower"
    shutil.copytree(good_folder, folder)
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


@pytest.mark.parametrize("second", ["lora_B.weight", "lora_up.weight", "lora.up.weight"])
def test_a_layer_of_a_lora_that_was_never_trained_is_no_damage(second, tmp_path):
    """Its second factor begins at zero; the first does not."""
    first, up = second.replace("B", "A").replace("up", "down"), {f"attn.{second}": torch.zeros(4, 2)}
    save_file(up | {f"attn.{first}": torch.ones(2, 3)}, tmp_path / "lora.safetensors")
    assert set(read_state(tmp_path / "lora.safetensors")) == {f"attn.{second}", f"attn.{first}"}
    save_file(up | {f"attn.{first}": torch.zeros(2, 3)}, tmp_path / "lora.safetensors")
    with pytest.raises(RewardError, match=f"nothing but zeros in 'attn.{first}'"):
        read_state(tmp_path / "lora.safetensors")


def test_the_canary_does_sing(tmp_path):
    """Without weights_only the same file does run its code, so that its silence above means something."""
    torch.save({"visual.proj": Payload(tmp_path / "canary")}, tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_a_file_of_another_architecture_is_named_as_such(good_folder, tmp_path):
    with pytest.raises(RewardError, match=r"open_clip_model\.safetensors: .* not the ViT-H-14 \(224 px\)"):
        REWARDS["hpsv2"].inspect(good_folder / "open_clip_model.safetensors")
    with pytest.raises(RewardError, match="no such file"):
        REWARDS["hpsv2"].inspect(tmp_path / "absent.pt")


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
def test_damaged_config_gives_one_line(change, message, good_folder, tmp_path):
    folder = tmp_path / "tower"
    shutil.copytree(good_folder, folder)
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
        REWARDS["clip"].inspect(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
