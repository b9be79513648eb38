"""What cannot work on SD3, FLUX.1 and Qwen-Image: one line before the first network call, naming the flag and the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderTiny
from flow_models import FAMILIES, load_pipeline, save_flow

from train_t2i.build import check_family_flags, latent_shape
from train_t2i.config import Config
from train_t2i.errors import UserError
from train_t2i.families import family_class, load_family


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: save_flow(root / name, name) for name in FAMILIES}


def ours(folder: Path, **options: Any) -> Any:
    return load_family("auto", str(folder), size_px=(48, 64), text_length=24, **options)


def test_what_cannot_be_is_told_in_one_line(folders: dict[str, Path], tmp_path: Path, tiny_vae_folder: Path) -> None:
    with pytest.raises(UserError, match="--tiny-vae: Qwen-Image has no tiny decoder"):
        ours(folders["qwen_image"], tiny_vae=str(tiny_vae_folder))
    with pytest.raises(RuntimeError, match="encoders were not loaded"):
        ours(folders["flux"], encoders=False).encode(["a small red circle"])
    file = tmp_path / "flux1-dev.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="is a file"):
        load_family("flux", str(file))


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_half_a_file_of_weights_is_told_in_one_line(part: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers and diffusers raise different errors for a download that was cut off."""
    folder = shutil.copytree(folders["flux"], tmp_path / "cut")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match=f"--pretrained-model {folder}: cannot be loaded"):
        ours(folder).load(torch.float32)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_an_autoencoder_of_another_family_is_refused_before_anything_is_made(
    name: str, folders: dict[str, Path], sdxl_folder: Path, tiny_vae_folder: Path, tmp_path: Path
) -> None:
    """A tiny decoder serves rewards alone: it would fail when they begin, after all of the cold start."""
    other, model = ("sdxl", folders["sd3"]) if name == "sd3" else ("sd3", sdxl_folder)
    vae = {"sdxl": sdxl_folder, **folders}[other] / "vae"
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path)
    tiny_vae = tiny_vae_folder if other == "sdxl" else tmp_path
    has, wants = (4, 16) if name == "sd3" else (16, 4)
    for flag, source in {"vae": vae, "tiny_vae": tiny_vae}.items():
        told = f"--{flag.replace('_', '-')} {source}: its latents have {has} channels, this model's {wants}"
        with pytest.raises(UserError, match=told):
            load_family(name, str(model), **{flag: str(source)})


def test_qwens_own_kind_of_autoencoder_is_compared_too(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["qwen_image"] / "vae"
    config = AutoencoderKLQwenImage.load_config(source) | {"z_dim": 8}
    AutoencoderKLQwenImage.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its latents have 8 channels, this model's 16"):
        ours(folders["qwen_image"], vae=str(tmp_path))
    ours(folders["qwen_image"], vae=str(source))


def test_a_vae_is_no_tiny_decoder(folders: dict[str, Path]) -> None:
    """diffusers would draw its weights at random and say so in a warning."""
    with pytest.raises(UserError, match="holds no AutoencoderTiny"):
        ours(folders["sd3"], tiny_vae=str(folders["sd3"] / "vae"))


def test_a_size_beyond_the_table_of_positions_is_refused_before_the_network_is_called(folders: dict[str, Path]) -> None:
    """The tiny SD3's table has 8 rows of 16 pixels; the largest size that is let through is one that the network takes."""
    family = ours(folders["sd3"])
    net, cond = family.load(torch.float32), family.encode(["a small red circle"])

    def predict(shape: tuple[int, int, int]) -> torch.Tensor:
        return family.call(net, torch.zeros(1, *shape), torch.ones(1), cond)

    assert predict(latent_shape(family, (128, 64))).shape == (1, 16, 16, 8)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        predict((16, 18, 8))
    with pytest.raises(UserError, match="--resolution 64x144: the model takes at most 128 pixels a side") as refused:
        latent_shape(family, (144, 64))
    assert refused.value.hint == "e.g. 64x128"
    assert latent_shape(ours(folders["flux"]), (144, 64)) == (16, 18, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_that_the_pipeline_would_refuse_is_refused(name: str, folders: dict[str, Path]) -> None:
    """The exported folder's call is told the length: the bound is the stock pipeline's own."""
    limit = family_class(name).max_text_length
    check_family_flags(Config(text_length=limit), name)
    with pytest.raises(UserError, match=f"--text-length {limit + 1}: the pipeline of {name} takes at most {limit}"):
        check_family_flags(Config(text_length=limit + 1), name)
    pipe = load_pipeline(folders[name], name)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    pipe("a small red circle", **call, max_sequence_length=limit)
    with pytest.raises(ValueError, match="max_sequence_length"):
        pipe("a small red circle", **call, max_sequence_length=limit + 1)


def test_a_guidance_that_nobody_is_told_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.1-schnell's transformer has no embedding for it."""
    schnell = shutil.copytree(folders["flux"], tmp_path / "schnell")
    config = schnell / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    ours(schnell)
    with pytest.raises(UserError, match="--guidance-embed does nothing"):
        ours(schnell, guidance=2.0)
    ours(folders["flux"], guidance=2.0)


@pytest.mark.parametrize("flag", ["--text-length 64", "--guidance-embed 2"])
def test_the_teachers_flags_are_looked_at_too(
    flag: str, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tiny_runs.refused(
        capsys, "sample", "--teacher", "--pretrained-model", sdxl_folder, "--resolution", "32", "--out", tmp_path,
        "--prompt", "a small red circle", *flag.split(),
    )  # fmt: skip
    assert f"{flag.split()[0]} does nothing for sdxl" in told
