"""SDXL in one .safetensors file: the same model as its folder, without a word to a hub."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from single_file import save_single_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from train_t2i.errors import UserError
from train_t2i.families import load_family, sdxl_file

PROMPTS = ["a red circle", "Zürich naïve-ness 1234, a blue square on a very long yellow ground " * 3]


@pytest.fixture(scope="module")
def pipe():
    """A tiny SDXL with CLIP's own tokenizers."""
    made = tiny.sdxl_pipeline(seed=3)
    made.tokenizer, made.tokenizer_2 = sdxl_file.tokenizers()
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        shape = getattr(made, name).config.to_dict() | {"vocab_size": 49408, "eos_token_id": 2, "bos_token_id": 0}
        torch.manual_seed(1)
        setattr(made, name, kind(CLIPTextConfig(**shape | {"pad_token_id": 1})))
    return made


@pytest.fixture(scope="module")
def file(pipe, tmp_path_factory) -> Path:
    return save_single_file(pipe, tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.fixture
def tiny_shapes(pipe, monkeypatch) -> None:
    """The shapes of the tiny model in the place of the published ones."""
    for name, config in (("UNET", pipe.unet.config), ("VAE", pipe.vae.config)):
        monkeypatch.setattr(sdxl_file, name, {k: v for k, v in config.items() if not k.startswith("_")})
    for name, encoder in (("CLIP_L", pipe.text_encoder), ("CLIP_G", pipe.text_encoder_2)):
        wanted = getattr(sdxl_file, name)
        monkeypatch.setattr(sdxl_file, name, {key: getattr(encoder.config, key) for key in wanted})


def test_a_file_is_the_same_model_as_its_folder(pipe, file, tiny_shapes, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    ours, theirs = load_family("auto", str(file)), load_family("auto", str(tmp_path))
    mine, their = ours.encode(PROMPTS, "words"), theirs.encode(PROMPTS, "words")
    assert torch.equal(mine.tokens, their.tokens)
    assert torch.equal(mine.pooled, their.pooled)
    assert torch.equal(mine.negative.tokens, their.negative.tokens)
    assert not ours.encode(PROMPTS, "").negative.tokens.any()  # zeros, as the published pipeline has it
    assert torch.equal(ours.path.alphas_cumprod, theirs.path.alphas_cumprod)
    z = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.decode(z), theirs.decode(z))
        calls = [f.call(f.load(torch.float32), z, torch.tensor([0.3, 0.9]), mine) for f in (ours, theirs)]
    assert torch.equal(*calls)


def test_a_vae_of_ones_own_may_be_a_file(pipe, file, tiny_shapes, tmp_path):
    pipe.save_pretrained(tmp_path)
    family = load_family("auto", str(tmp_path), vae=str(file))
    assert family.vae.config.scaling_factor == pipe.vae.config.scaling_factor
    assert torch.equal(family.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)


def test_the_published_shapes_have_the_published_sizes():
    """SDXL base 1.0: parameters of the UNet, the VAE and the two text encoders."""
    with torch.device("meta"), sdxl_file.configs() as folder:
        found = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
            CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")),
        ]
    sizes = [sum(p.numel() for p in net.parameters()) for net in found]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]


def test_the_tokenizers_are_clips():
    first, second = sdxl_file.tokenizers()
    theirs = open_clip.SimpleTokenizer()
    assert len(first) == len(second) == 49408
    for prompt in (*PROMPTS, "<b> 東京 \U0001f600 it's"):
        assert first(prompt).input_ids == [49406, *theirs.encode(prompt), 49407]
    assert first("a", padding="max_length").input_ids[2:] == [49407] * 75
    assert second("a", padding="max_length").input_ids[2:] == [49407, *[0] * 74]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: {k: v for k, v in state.items() if "conditioner" not in k}, "no weights of the first text"),
        (lambda state: {k: v for k, v in state.items() if "first_stage" not in k}, "no weights of the VAE"),
        (lambda state: {k: v for k, v in state.items() if "middle_block" not in k}, "weights are missing"),
        (lambda state: {**state, "v_pred": torch.zeros(1)}, "does not predict noise"),
    ],
)
def test_a_file_that_is_no_whole_sdxl_says_why(file, tiny_shapes, tmp_path, change, why):
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), other)
    with pytest.raises(UserError, match=why):
        load_family("auto", str(other)).load(torch.float32)


def test_a_tiny_decoder_is_a_folder(sdxl_folder, file):
    with pytest.raises(UserError, match="is a file"):
        load_family("auto", str(sdxl_folder), tiny_vae=str(file))
