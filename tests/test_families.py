"""SDXL against the stock pipeline: what is encoded, what reaches the UNet, what is decoded; and models that cannot be used.

Every comparison runs on two random architectures, so that nothing is fitted to one of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from train_t2i.errors import UserError
from train_t2i.families import Cond, Family, family_of, load_family

PROMPTS = ["a red circle", "two blue squares and nothing else on a very long yellow ground " * 3]


@pytest.fixture(scope="module", params=["sdxl", "sdxl-2"])
def folder(request, sdxl_folder, sdxl_folder_2) -> Path:
    return {"sdxl": sdxl_folder, "sdxl-2": sdxl_folder_2}[request.param]


@pytest.fixture(scope="module")
def family(folder) -> Family:
    return load_family("auto", str(folder))


@pytest.fixture(scope="module")
def stock(folder) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent(family: Family, height: int, width: int, seed: int = 0) -> Tensor:
    shape = (2, 4, height // family.vae_factor, width // family.vae_factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [None, "", "a blurred picture"])
def test_encode_is_the_pipelines(family, stock, negative):
    guided = negative is not None
    theirs = stock.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided,
        negative_prompt=[negative] * 2 if negative else None,
    )  # fmt: skip
    cond = family.encode(PROMPTS, negative)
    assert torch.equal(cond.tokens, theirs[0])
    assert torch.equal(cond.pooled, theirs[2])
    assert not cond.tokens.requires_grad
    if not guided:
        assert cond.negative is None
        return
    assert torch.equal(cond.negative.tokens, theirs[1])
    assert torch.equal(cond.negative.pooled, theirs[3])
    assert (negative == "") == bool((cond.negative.tokens == 0).all())  # the published pipeline's zeros


def test_rows_are_encoded_alone(family):
    """A prompt is told the same way in any batch."""
    together = family.encode(PROMPTS, None)
    for row, prompt in enumerate(PROMPTS):
        alone = family.encode([prompt], None)
        torch.testing.assert_close(together.tokens[row], alone.tokens[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], rtol=1e-5, atol=1e-5)


def test_guidance_without_a_negative_is_a_mistake_of_the_caller(family):
    with pytest.raises(ValueError, match="negative"):
        family.encode(PROMPTS, None).with_negative()


# -- what reaches the network ----------------------------------------------------------------------------------------


class Recorder:
    """Keeps what a network is called with."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.calls: list[dict[str, Tensor]] = []
        self._hook = net.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, positional, named) -> None:
        told = named["added_cond_kwargs"]
        self.calls.append(
            {
                "x": positional[0],
                "time": torch.as_tensor(positional[1]),
                "tokens": named["encoder_hidden_states"],
                "pooled": told["text_embeds"],
                "time_ids": told["time_ids"],
            }
        )

    def __enter__(self) -> list[dict[str, Tensor]]:
        return self.calls

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 72)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_network_is_told_what_the_stock_pipeline_tells_it(family, stock, height, width, cfg):
    noise = latent(family, height, width)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    with Recorder(stock.unet) as theirs:
        stock(
            PROMPTS, height=height, width=width, num_inference_steps=2, guidance_scale=cfg, latents=noise,
            negative_prompt=["words"] * 2, output_type="latent",
        )  # fmt: skip
    net = family.load(torch.float32)
    cond = family.encode(PROMPTS, "words")
    grid = family.path.dense_grid(2)
    with Recorder(net) as ours, torch.no_grad():
        for t, their in zip(grid[:-1], theirs, strict=True):
            rows = their["x"].shape[0]
            out = family.call(net, their["x"], t.expand(rows), cond.with_negative() if cfg > 1 else cond)
            assert out.shape == their["x"].shape
    assert len(ours) == len(theirs) == 2
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.keys() == their.keys()
        for name in ("x", "tokens", "pooled", "time_ids"):
            torch.testing.assert_close(mine[name].float(), their[name].float(), rtol=0, atol=0, msg=name)
        assert mine["time"].dtype == torch.int64
        assert (mine["time"] == their["time"]).all()
    assert ours[0]["time_ids"][0].tolist() == [height, width, 0, 0, height, width]


def test_the_denoiser_is_bare_frozen_and_in_the_format_asked_for(family):
    net = family.load(torch.bfloat16)
    assert not net.training
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in net.parameters())
    assert not [name for name, _ in net.named_modules() if "lora" in name]


def test_every_row_is_called_at_its_own_time(family):
    net, cond = family.load(torch.float32), family.encode(PROMPTS, None)
    x, t = latent(family, 32, 32), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        together = family.call(net, x, t, cond)
        for row in range(2):
            alone = family.call(net, x[row : row + 1], t[row : row + 1], family.encode([PROMPTS[row]], None))
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


# -- images ----------------------------------------------------------------------------------------------------------


def test_decode_is_the_pipelines(family, stock):
    z = latent(family, 40, 64)
    with torch.no_grad():
        theirs = stock.vae.decode(z / stock.vae.config.scaling_factor, return_dict=False)[0]
        theirs = stock.image_processor.postprocess(theirs, output_type="pt")
        ours = family.decode(z)
    assert ours.shape == (2, 3, 40, 64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_to_latents_is_the_mode_of_the_pipelines_encoder(family, stock):
    images = torch.rand((2, 3, 40, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = stock.vae.encode(images * 2 - 1).latent_dist.mode() * stock.vae.config.scaling_factor
    ours = family.to_latents(images.requires_grad_(True))
    torch.testing.assert_close(ours, theirs)
    assert not ours.requires_grad


def test_a_vae_with_a_shift_is_undone(folder):
    """SDXL's own has none, its fine-tunes may."""
    family = load_family("auto", str(folder))
    images, z = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1)), latent(family, 32, 32)
    before, decoded = family.to_latents(images), family.decode(z)
    family.vae.register_to_config(shift_factor=0.3)
    scale = family.vae.config.scaling_factor
    torch.testing.assert_close(family.to_latents(images), before - 0.3 * scale)
    torch.testing.assert_close(family.decode(z - 0.3 * scale), decoded)


def test_the_tiny_decoder_serves_rewards_alone(sdxl_folder, tiny_vae_folder):
    family = load_family("auto", str(sdxl_folder), tiny_vae=str(tiny_vae_folder))
    z = latent(family, 32, 48)
    tiny_vae = AutoencoderTiny.from_pretrained(tiny_vae_folder)
    with torch.no_grad():
        theirs = (tiny_vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(family.decode(z, fast=True), theirs)
        assert not torch.allclose(family.decode(z), theirs)
        bare = load_family("auto", str(sdxl_folder))
        assert torch.equal(bare.decode(z, fast=True), bare.decode(z))


@pytest.mark.parametrize("fast", [False, True])
def test_decoding_is_differentiable_and_checkpointing_changes_nothing(sdxl_folder, tiny_vae_folder, fast):
    found = []
    for checkpointing in (False, True):
        family = load_family(
            "auto", str(sdxl_folder), tiny_vae=str(tiny_vae_folder), checkpoint_decoder=checkpointing
        )  # fmt: skip
        assert family.vae.decoder.gradient_checkpointing is checkpointing
        z = latent(family, 32, 32).requires_grad_(True)
        image = family.decode(z, fast=fast)
        image.mean().backward()
        found.append((image.detach(), z.grad))
    assert found[0][1].abs().sum() > 0
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_vae_stays_fp32(sdxl_folder):
    family = load_family("auto", str(sdxl_folder), dtype=torch.bfloat16)
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    assert family.encode(PROMPTS, None).tokens.dtype == torch.bfloat16
    assert family.decode(latent(family, 32, 32).bfloat16()).dtype == torch.float32


# -- models that cannot be used --------------------------------------------------------------------------------------


def broken(sdxl: Path, folder: Path, how: str) -> Path:
    if how == "empty":
        folder.mkdir()
        return folder
    if how == "text file":
        folder.write_text("not weights")
        return folder
    if how == "safetensors":
        file = folder.with_suffix(".safetensors")
        file.write_bytes(b"\x08\0\0\0\0\0\0\0{}broken")
        return file
    shutil.copytree(sdxl, folder)
    if how == "no unet":
        shutil.rmtree(folder / "unet")
    elif how == "truncated unet":
        (file,) = (folder / "unet").glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "another pipeline":
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    elif how == "broken index":
        (folder / "model_index.json").write_text("{")
    elif how == "index of a list":
        (folder / "model_index.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    "how",
    ["empty", "text file", "safetensors", "no unet", "truncated unet", "another pipeline", "broken index", "index of a list"],
)  # fmt: skip
def test_a_folder_that_is_no_sdxl_is_one_line(sdxl_folder, tmp_path, how):
    source = broken(sdxl_folder, tmp_path / "model", how)
    with pytest.raises(UserError) as caught:
        load_family("auto", str(source)).load(torch.float32)
    assert str(source) in caught.value.message
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_hub_id_out_of_reach_is_one_line():
    with pytest.raises(UserError, match="--pretrained-model nobody/nothing-here"):
        load_family("auto", "nobody/nothing-here")


@pytest.mark.parametrize("flag", ["vae", "tiny_vae"])
def test_a_wrong_decoder_names_its_flag(sdxl_folder, tmp_path, flag):
    with pytest.raises(UserError, match="--" + flag.replace("_", "-")):
        load_family("auto", str(sdxl_folder), **{flag: str(tmp_path)})


def test_a_vae_of_ones_own_replaces_the_models(sdxl_folder, sdxl_folder_2):
    family = load_family("auto", str(sdxl_folder), vae=str(sdxl_folder_2 / "vae"))
    assert family.vae_factor == 4
    assert family.vae.config.scaling_factor == 0.5


def test_a_v_predicting_model_is_refused(tmp_path):
    folder = tiny.save_sdxl(tmp_path / "v", prediction_type="v_prediction")
    with pytest.raises(UserError, match="v_prediction"):
        load_family("auto", str(folder))


def test_the_models_own_betas_are_used(tmp_path):
    folder = tiny.save_sdxl(tmp_path / "zero-snr", trained_betas=[0.001] * 1000)
    path = load_family("auto", str(folder)).path
    torch.testing.assert_close(path.alphas_cumprod[-1], torch.tensor(0.999**1000), rtol=1e-3, atol=0)


def test_the_family_is_read_off_the_folder(sdxl_folder):
    assert family_of(str(sdxl_folder)) == "sdxl"
    with pytest.raises(UserError, match="--pretrained-model stabilityai/nothing-here: cannot be loaded"):
        family_of("stabilityai/nothing-here")


def test_lora_goes_on_every_kind_of_layer_and_a_target_that_matches_none_is_an_error(family):
    networks = tiny.networks(family, "shared")
    adapted = {name.split(".lora_A")[0] for name in networks.named_parameters("guidance") if ".lora_A" in name}
    for target in family.lora_targets:
        assert any(f".{name}".endswith(f".{target}") for name in adapted), target

    class Wrong:
        lora_targets = (*family.lora_targets, "to_nothing")

        def __getattr__(self, name):
            return getattr(family, name)

    with pytest.raises(UserError, match="to_nothing"):
        tiny.networks(Wrong(), "shared")


def test_lora_targets_are_the_published_ones(family):
    """DMD2 and DMDR adapt attention, feed-forward, convolutions and the time projections of SDXL."""
    published = (
        "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
        "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
    )
    assert set(family.lora_targets) == set(published.split())


def test_conditioning_stacks_negative_rows_first():
    positive = Cond(torch.ones(2, 3, 4), torch.ones(2, 5), negative=Cond(torch.zeros(2, 3, 4), torch.zeros(2, 5)))
    both = positive.with_negative()
    assert both.tokens[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert both.pooled[:, 0].tolist() == [0, 0, 1, 1]
    assert both.negative is None
