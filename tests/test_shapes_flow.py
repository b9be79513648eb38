"""The tiny SD3, FLUX.1 and Qwen-Image: true tokenizers, encoders that know the scene, teachers that draw it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import flow_models
import pytest
import torch
from diffusers.modular_pipelines.qwenimage import prompt_templates
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from shapes import finetune, flow_stages, scenes
from shapes import qwen_autoencoder as qa
from shapes.flow_models import PIPELINES, TEXT_LENGTH, FlowRecipe, new_transformer
from shapes.guidance import GuidanceRecipe, rows_of
from shapes.long_text_encoders import T5Recipe, new_t5, with_projection
from shapes.stage import Paths
from shapes.tokenizer import new_qwen_tokenizer, new_t5_tokenizer
from shapes.world import load_world
from train_t2i.families import Cond

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
CAPTIONS = scenes.unique_captions("train", 3, 200)


def test_the_templates_have_the_lengths_that_the_pipelines_cut_off() -> None:
    """34 tokens before a prompt, 64 before the pictures of an edit; their own numbers, not ours."""
    tokenizer = new_qwen_tokenizer()
    counted = {
        name: len(tokenizer(getattr(prompt_templates, name).split("{}")[0].split("<|vision_start|>")[0]).input_ids)
        for name in dir(prompt_templates)
        if name.endswith("PROMPT_TEMPLATE")
    }
    assert counted == {
        "QWENIMAGE_PROMPT_TEMPLATE": 34, "QWENIMAGE_EDIT_PROMPT_TEMPLATE": 64, "QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE": 64,
    }  # fmt: skip


def test_qwens_tokenizer_keeps_every_byte_and_survives_its_folder(tmp_path: Path) -> None:
    tokenizer = new_qwen_tokenizer()
    odd = "Zürich 東京 <b> naïve-ness 1234 \U0001f600"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again(odd).input_ids) == odd
    assert again(CAPTIONS).input_ids == tokenizer(CAPTIONS).input_ids


def test_words_of_the_world_are_one_piece_of_t5_and_nothing_in_a_caption_is_unknown(tmp_path: Path) -> None:
    tokenizer = new_t5_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in CAPTIONS:
        ids = again(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert again.unk_token_id not in ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 1 <= TEXT_LENGTH


def test_every_head_of_a_new_t5_looks_at_another_neighbour() -> None:
    """What it attends to most, of places that are told apart by distance alone."""
    encoder = new_t5(T5Recipe(), 50)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(9, 9)[0]  # (heads, query, key)
    assert [int(bias[head, 4].argmax()) - 4 for head in range(4)] == [-1, 1, -2, 2]


def test_a_projection_that_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = CLIPTextModel(CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=39,
    )).eval()  # fmt: skip
    ids = torch.tensor([[3, 5, 39, 39]])
    made = with_projection(plain)(ids)
    torch.testing.assert_close(made.text_embeds, plain(ids).pooler_output)
    torch.testing.assert_close(made.last_hidden_state, plain(ids).last_hidden_state)


def test_one_frame_is_what_the_video_autoencoder_makes_of_it() -> None:
    torch.manual_seed(0)
    vae = qa.new_autoencoder(qa.QwenAutoencoderRecipe(base_width=4, width_factors=(1, 1, 2, 2)))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, latents = torch.rand(2, 3, 32, 48), torch.randn(2, 16, 4, 6)
    expected = vae.encode(images.unsqueeze(2) * 2 - 1).latent_dist.mean[:, :, 0]
    shown = vae._decode(latents.unsqueeze(2)).sample[:, :, 0]
    torch.testing.assert_close(qa.encode(vae, images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(qa.decode(vae, latents), (shown / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_qwens_autoencoder_sees_pictures_and_then_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, trained = load_world("train", 0, 512), []
    fit = qa.fit_autoencoder

    def spied(name: str, frame: Any, data: Any, *rest: Any) -> Any:
        trained.append((name, data.pictures.shape[1]))
        return fit(name, frame, data, *rest)

    monkeypatch.setattr(qa, "fit_autoencoder", spied)
    for name in ("world", "judged"):
        monkeypatch.setattr(flow_stages, name, lambda paths: few)
    for name in ("QWEN_AUTOENCODER", "RECOLOURED"):
        short = replace(getattr(flow_stages, name), crop_steps=0, whole_steps=1, batch_size=4)
        monkeypatch.setattr(flow_stages, name, short)
    flow_stages.make_qwen_autoencoder(Paths(tmp_path, tmp_path), "run")
    assert trained == [("Qwen-Image autoencoder", 3), ("Qwen-Image autoencoder, twins", 6)]


def test_qwen_image_and_its_editor_share_an_autoencoder() -> None:
    plain, editor = (CHECKPOINTS / name / "vae" for name in ("tiny-qwen-image", "tiny-qwen-image-edit"))
    for file in plain.iterdir():
        assert (editor / file.name).read_bytes() == file.read_bytes(), file.name


def test_every_leg_goes_on_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(finetune.subprocess, "run", lambda command, check, env=None: commands.append(command))
    recipe = FlowRecipe("flux", 0, width=32, heads=2, layers=1)
    found = finetune.supervised(tmp_path, tmp_path, recipe, "run", pictures_seed=41, legs=(10, 30))
    _, first, second = commands
    assert first[-4:] == ["--exp-name", "run", "--max-train-steps", "10"]
    record = tmp_path / "run" / "checkpoints" / "torch_units" / "step-10.pt"
    assert second[-6:] == ["--exp-name", "run-30", "--max-train-steps", "30", "--resume-ckpt", str(record)]
    assert found == tmp_path / "run-30" / "checkpoints" / "accelerator_1" / "step-30"


def test_a_checkpoint_of_parameters_alone_is_installed_with_the_buffers_of_its_configuration(tmp_path: Path) -> None:
    """SD3's table of positions is a buffer: no checkpoint has it."""
    torch.manual_seed(0)
    trained, folder = (
        new_transformer(FlowRecipe("sd3", 0, width=16, heads=2, layers=1), 16, 16),
        tmp_path / "transformer",
    )
    new_transformer(FlowRecipe("sd3", 1, width=16, heads=2, layers=1), 16, 16).save_pretrained(folder)
    parameters = {name: parameter.detach() for name, parameter in trained.named_parameters()}
    assert parameters.keys() < trained.state_dict().keys()
    save_file(parameters, tmp_path / "model.safetensors")
    finetune.install(tmp_path, folder, type(trained))
    installed = type(trained).from_pretrained(folder, dtype=torch.float16).state_dict()
    assert installed.keys() == trained.state_dict().keys()
    for name, tensor in trained.half().state_dict().items():
        assert torch.equal(installed[name], tensor), name
    del parameters["proj_out.weight"]
    save_file(parameters, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match=r"proj_out\.weight"):
        finetune.install(tmp_path, folder, type(trained))


def test_guidance_is_distilled_from_the_same_network_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stage before keeps, not what the first distillation put in its place."""
    paths = Paths(tmp_path / "out", tmp_path / "work")
    monkeypatch.setattr(flow_stages, "new_parts", lambda recipe, paths: flow_models.parts("flux"))
    monkeypatch.setattr(finetune, "supervised", lambda *arguments, **more: tmp_path)
    monkeypatch.setattr(finetune, "install", lambda trained, folder, kind: None)
    monkeypatch.setattr(flow_stages, "world", lambda paths: load_world("train", 0, 4))
    monkeypatch.setattr(flow_stages, "teacher_adherence", lambda family, folder: {})
    monkeypatch.setattr(flow_stages, "GUIDANCE", GuidanceRecipe(pictures=4, steps=2, batch_size=2, learning_rate=0.1))
    flow_stages.make_pipeline(flow_models.RECIPES["flux"], paths, "run")
    weights = paths.flow("flux") / "transformer" / "diffusion_pytorch_model.safetensors"
    made = [weights.read_bytes()]
    for _ in range(2):
        flow_stages.make_guidance(paths, "run")
        made.append(weights.read_bytes())
    assert made[0] != made[1]
    assert made[1] == made[2]


def test_rows_of_a_conditioning() -> None:
    tokens = torch.arange(12.0).reshape(3, 2, 2)
    cond = Cond(tokens, pooled=tokens[:, 0], negative=Cond(-tokens), guidance=torch.tensor([1.0, 2.0, 3.0]))
    some = rows_of(cond, torch.tensor([2, 0]))
    assert torch.equal(some.tokens, tokens[[2, 0]])
    assert some.negative is not None
    assert torch.equal(some.negative.tokens, -tokens[[2, 0]])
    assert some.guidance is not None
    assert some.guidance.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("family", PIPELINES)
def test_a_committed_pipeline_is_small(family: str) -> None:
    files = Paths(CHECKPOINTS, Path()).flow(family).rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 6_000_000


@pytest.mark.parametrize("family", PIPELINES)
def test_a_committed_teacher_draws_what_it_is_told(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipeline on held-out captions, at the guidance that its manifest names best."""
    folder = Paths(CHECKPOINTS, Path()).flow(family)
    quality = tomllib.loads((CHECKPOINTS / "manifest.toml").read_text())["tiny"][folder.name]["measured"]
    scores = {float(key.split()[-1]): value for key, value in quality.items() if "adherence" in key}
    best = max(scores, key=lambda cfg: scores[cfg])
    assert scores[best] >= 0.85
    monkeypatch.setattr(flow_stages, "CFGS", (best,))
    monkeypatch.setattr(flow_stages, "PROMPTS", 40)
    (found,) = flow_stages.teacher_adherence(family, folder).values()
    assert found >= 0.75
