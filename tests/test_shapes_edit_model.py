"""The tiny Qwen-Image-Edit: its tokenizer, what its encoder is trained on, the folder that the stock pipelines load."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.modular_pipelines.qwenimage import prompt_templates
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from shapes import edit_codes as codes
from shapes import edit_rows as er
from shapes import edit_stages, edits, finetune, scenes, world
from shapes import edit_text as et
from shapes import qwen_autoencoder as qa
from shapes.render import COLOUR_RGB
from shapes.stage import Paths
from shapes.text_encoders import CLASSES, Heads
from shapes.tokenizer import new_qwen_edit_tokenizer, new_qwen_tokenizer
from train_t2i.families.qwen_image_edit import tell_token_types

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
RECIPE = edit_stages.QWEN_EDIT_TEXT


@pytest.fixture(scope="module")
def encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Untrained for edits."""
    torch.manual_seed(0)
    captions = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        CHECKPOINTS / "tiny-qwen-image" / "text_encoder", torch_dtype=torch.float32
    )
    return et.new_edit_encoder(RECIPE, new_qwen_edit_tokenizer(), captions).eval()


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory) -> Path:
    """The assembled pipeline, which edits nothing yet."""
    paths = Paths(CHECKPOINTS, tmp_path_factory.mktemp("work"))
    encoder.save_pretrained(edit_stages.part(paths, "qwen-edit-text"))
    edit_stages.assemble(paths, paths.work / "pipeline")
    return paths.work / "pipeline"


# ------------------------------------------------------------------ autoencoder
def test_a_twin_is_the_same_picture_in_other_hues():
    data = world.load_world("train", 0, 12)
    twins = qa.beside_twins(data, "train", 0).pictures
    plain, hued = twins[:, :3], twins[:, 3:]
    assert torch.equal(plain, data.pictures)
    corner, other = plain[:, :, 0, 0], hued[:, :, 0, 0]  # no object reaches it
    assert torch.equal(corner, other)
    changed = (plain != hued).any(1)
    objects = (plain != corner[..., None, None]).any(1)
    assert torch.equal(changed | objects, objects)  # nothing but objects
    assert changed.sum() > 0.9 * objects.sum()
    in_them = hued.permute(0, 2, 3, 1)[changed].unique(dim=0)
    assert len(in_them) > 12  # colours of their own, not six


def test_the_editors_autoencoder_keeps_the_latents_of_pictures_as_they_are():
    data, moved = world.load_world("train", 0, 8), {}
    images = data.images(torch.arange(8))
    for anchor in (0.0, 10.0):
        recipe = qa.RecolouredRecipe(crop_steps=0, whole_steps=12, batch_size=8, anchor_weight=anchor)
        vae = edit_stages.loaded(AutoencoderKLQwenImage, CHECKPOINTS / "tiny-qwen-image" / "vae")
        before = qa.encode(vae, images)
        qa.train_recoloured(vae, qa.beside_twins(data, "train", 0), recipe)
        moved[anchor] = float((qa.encode(vae, images) - before).square().mean())
        assert not any(p.requires_grad for p in vae.parameters())
        assert torch.equal(vae.quant_conv.bias[qa.CHANNELS :], torch.full((qa.CHANNELS,), -8.0))
    assert 0 < moved[10.0] < moved[0.0] / 2


# ------------------------------------------------------------------ tokenizer
def test_words_of_instructions_are_one_token_each_and_heads_have_their_published_lengths():
    tokenizer = new_qwen_edit_tokenizer()
    for edit in edits.samples("train", 0, 300):
        words = edit.instruction.replace(",", " ,").replace("1", "1 ").split()
        spaces = sum(edit.instruction.count(f" {digit}") for digit in "12")  # digits stand alone
        assert len(tokenizer(edit.instruction).input_ids) == len(words) + spaces, edit.instruction
    assert len(tokenizer(er.HEAD).input_ids) == er.CUT == 64
    assert tokenizer.tokenize("Picture 1: ")[0] == "Picture"
    assert len(tokenizer(prompt_templates.QWENIMAGE_PROMPT_TEMPLATE.split("{}")[0]).input_ids) == 34


def test_the_committed_qwen_image_keeps_its_tokenizer():
    committed = AutoTokenizer.from_pretrained(CHECKPOINTS / "tiny-qwen-image" / "tokenizer")
    assert committed.get_vocab() == new_qwen_tokenizer().get_vocab()


# ------------------------------------------------------------------ encoder
def test_a_new_encoder_knows_the_words_that_it_knew(encoder):
    captions = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        CHECKPOINTS / "tiny-qwen-image" / "text_encoder", torch_dtype=torch.float32
    )
    before, after = new_qwen_tokenizer(), new_qwen_edit_tokenizer()
    text = "a small red circle on a grey background"
    told = [torch.tensor([tokenizer(text).input_ids]) for tokenizer in (before, after)]
    assert told[0].shape == told[1].shape
    with torch.no_grad():
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
                  for model, ids in zip((captions, encoder), told)]  # fmt: skip
    torch.testing.assert_close(*states)


@pytest.mark.parametrize(("sources", "plain"), [(1, False), (1, True), (2, False)])
def test_states_are_those_of_the_stock_pipeline_that_is_told_where_pictures_are(encoder, folder, sources, plain):
    """Rows of different lengths at once, the head read once: the pipeline encodes each row alone, and whole."""
    processor = et.new_processor(RECIPE, new_qwen_edit_tokenizer())
    drawn = er.drawn("heldout", 1, 4, sources)
    told = er.tell(encoder, processor, drawn, plain)
    with torch.no_grad():
        states = et.states(encoder, told, torch.arange(4))
    pipeline = (QwenImageEditPipeline if plain else QwenImageEditPlusPipeline).from_pretrained(
        folder, torch_dtype=torch.float32, text_encoder=None
    )
    pipeline.register_modules(text_encoder=encoder)
    hook = tell_token_types(encoder)
    assert hook is not None
    try:
        for row, edit in enumerate(drawn.edits):
            shown = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in drawn.pictures[row]]
            expected, _ = pipeline._get_qwen_prompt_embeds(edit.instruction, shown, torch.device("cpu"), torch.float32)
            end = int(told.ends[row])
            torch.testing.assert_close(states[row, er.CUT : end], expected[0], rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()
    assert (told.ids[torch.arange(4)[:, None], told.seen_at] == encoder.config.vision_end_token_id).all()
    assert told.ids[torch.arange(4), told.whole_from].tolist() == [encoder.config.text_config.eos_token_id] * 4


def test_free_colours_are_no_held_out_pair_and_are_what_is_shown():
    count = 200
    rows, plain = er.drawn("train", 1, count, 1, free=True), er.drawn("train", 1, count, 1)
    assert [edit.instruction for edit in rows.edits] == [edit.instruction for edit in plain.edits]
    freed = (rows.shown_rgb - plain.shown_rgb).nan_to_num().abs().amax((1, 2, 3)) > 0
    assert 0.3 < freed.float().mean() < 0.6
    assert torch.equal(rows.pictures[~freed], plain.pictures[~freed])
    for row, edit in enumerate(rows.edits):
        shown = zip((*edit.sources[0].things, *edit.target.things), (*rows.shown_rgb[row, 0], *rows.wanted_rgb[row]))
        for thing, rgb in shown:
            for shape, colour in scenes.HELD_OUT_PAIRS:
                near = torch.dist(rgb, torch.tensor(COLOUR_RGB[colour])) < 0.25
                assert not (thing.shape == shape and near), (edit, rgb)
        if freed[row] and edit.kind == "recolour":
            new = edits.parse(edit.instruction)[1]["colour"]
            assert (rows.wanted_rgb[row] == torch.tensor(COLOUR_RGB[new])).all(-1).any()


def test_colours_are_read_as_numbers_and_judged_by_name():
    torch.manual_seed(0)
    reader, hidden = et.Reader(8, (2,)), torch.randn(2, 8)
    rgb = torch.tensor([[COLOUR_RGB["red"], COLOUR_RGB["blue"]], [COLOUR_RGB["green"], [float("nan")] * 3]])
    labels = reader.named(hidden)[0].argmax(1, keepdim=True)
    told = reader.rgb(hidden).view(2, 2, 3)
    expected = ((told - rgb)[~rgb.isnan()] ** 2).mean() * et.RGB_WEIGHT
    torch.testing.assert_close(reader.loss(hidden, labels, rgb) - reader.named.loss(hidden, labels), expected)
    with torch.no_grad():
        reader.rgb.weight.zero_()
        reader.rgb.bias.copy_(torch.tensor([*COLOUR_RGB["red"], *COLOUR_RGB["blue"]]) + 0.05)
    assert reader.right(hidden, labels, rgb).tolist() == [True, False]


def test_the_states_behind_the_text_say_an_object_each_and_where_it_is():
    scene = scenes.Scene(
        (scenes.Thing("small", "red", "circle"), scenes.Thing("large", "cyan", "cross")), "navy", relation="above"
    )
    rgb = torch.tensor([COLOUR_RGB["red"], COLOUR_RGB["cyan"]])
    said = codes.facts(scene, rgb)
    sizes, shapes, places, backgrounds, colour = said.split(codes.SPANS, -1)
    objects = [0, 1, 3, 4]  # the third is the background
    assert [[scenes.SIZES, scenes.SHAPES, scenes.POSITIONS][i][at] for i, part in enumerate((sizes, shapes, places))
            for at in part[:2].argmax(-1).tolist()] == ["small", "large", "circle", "cross", "top", "bottom"]  # fmt: skip
    assert torch.equal(said[3:], said[:2])
    assert backgrounds[2].argmax() == scenes.BACKGROUNDS.index("navy")
    assert not backgrounds[objects].any()
    assert not said[2, : -3 - len(scenes.BACKGROUNDS)].any()
    torch.testing.assert_close(colour[:2], 2 * rgb - 1)
    alone = codes.facts(scenes.Scene(scene.things[:1], "navy", position="left"), rgb)
    assert torch.equal(alone[0], alone[1])
    assert alone[0].split(codes.SPANS, -1)[2].argmax() == scenes.POSITIONS.index("left")


def test_what_is_said_is_read_back_and_one_wrong_fact_is_wrong():
    rows = er.drawn("heldout", 3, 20, 1)
    wanted = torch.stack([codes.facts(edit.target, rgb) for edit, rgb in zip(rows.edits, rows.wanted_rgb)])
    ways = codes.directions(96, 0)
    torch.testing.assert_close(ways @ ways.T, codes.LOUDNESS**2 * torch.eye(len(ways)), atol=1e-4, rtol=0)
    noise = torch.randn((20, len(codes.SAID), 96), generator=torch.Generator().manual_seed(0))
    assert codes.right(wanted @ ways + 0.4 * noise, wanted, ways).all()
    for state, fact in ((0, 0), (1, 3), (4, 7), (2, 12)):
        other = wanted.clone()
        other[:, state, fact] = 1.5 - other[:, state, fact]
        assert not codes.right(other @ ways, wanted, ways).all()
    dark = wanted.clone()
    dark[:, 1, -3:] = -1.0
    named = codes.right(dark @ ways, wanted, ways)
    green = torch.tensor([edit.target.things[-1].colour == "green" for edit in rows.edits])
    assert torch.equal(named, green)  # the nearest name of black


def test_attributes_that_no_row_has_cost_nothing():
    torch.manual_seed(0)
    heads, hidden = Heads(8), torch.randn(3, 8)
    labels = torch.zeros(3, len(CLASSES), dtype=torch.long)
    labels[:, 5:] = -100
    loss = heads.loss(hidden, labels)
    logits = heads(hidden)
    expected = torch.stack([torch.nn.functional.cross_entropy(one, labels[:, i]) for i, one in enumerate(logits[:5])])
    torch.testing.assert_close(loss, expected.mean())


# ------------------------------------------------------------------ folder and stages
def test_the_folder_is_small_and_its_transformer_starts_as_qwen_images(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (CHECKPOINTS / "tiny-qwen-image" / name).read_bytes()


@pytest.mark.parametrize("sources", [1, 2])
def test_the_stock_pipeline_edits_at_the_size_of_this_world(folder, sources, monkeypatch):
    monkeypatch.setattr(edit_stages, "STEPS", 2)
    drawn = er.drawn("heldout", 2, 1, sources)
    edit, shown = drawn.edits[0], [one.permute(1, 2, 0).numpy() for one in drawn.pictures[0]]
    pipeline = edit_stages.load_editor(folder)
    image = edit_stages.edit_with(pipeline, shown, edit.instruction, cfg=2.0, seed=0)
    assert image.shape == (3, 64, 64)
    assert torch.isfinite(image).all()
    assert edit_stages.stock.VAE_IMAGE_SIZE == 1024**2  # as it was
    other = edit_stages.edit_with(pipeline, [255 - one for one in shown], edit.instruction, cfg=2.0, seed=0)
    assert not torch.equal(image, other)


def test_the_transformer_is_trained_on_edits_by_the_trainer(tmp_path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(finetune.subprocess, "run", lambda command, check, env=None: commands.append(command))
    monkeypatch.setattr(edit_stages, "assemble", lambda paths, folder: None)
    monkeypatch.setattr(finetune, "install", lambda trained, folder, kind: None)
    monkeypatch.setattr(edit_stages, "editor_quality", lambda folder: {})
    monkeypatch.setattr(
        edit_stages,
        "QWEN_EDIT",
        edit_stages.EditRecipe(
            "qwen_image_edit_plus", 0, width=8, heads=1, layers=1, legs=(10,), pictures=5, shift=4.0
        ),
    )
    edit_stages.make_edit_pipeline(Paths(tmp_path / "out", tmp_path), "run")
    render, train = commands
    assert render[2:5] == ["shapes.edits", "render", "--split"]
    table = f"{render[render.index('--out') + 1]}/metadata.json"
    at = train.index("train") + 1
    flags = dict(zip(train[at::2], train[at + 1 :: 2]))
    assert train[train.index("--nproc-per-node") + 1] == "2"
    assert flags["--shift"] == "4.0"
    assert flags["--batch-size"] == "16"  # of 32, a process
    assert flags["--data-path-train"] == table
    assert flags["--model-family"] == "qwen_image_edit_plus"
    assert (flags["--source-size"], flags["--source-seen-size"], flags["--resolution"]) == ("64", "64", "64")


def test_the_committed_editor_does_what_it_is_told_and_leaves_the_rest_alone(monkeypatch):
    """The stock pipeline on held-out edits, at the guidance that its manifest names best."""
    folder = Paths(CHECKPOINTS, Path()).flow("qwen_image_edit")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    quality = tomllib.loads((CHECKPOINTS / "manifest.toml").read_text())["tiny"][folder.name]["measured"]
    scores = {float(key.split()[-1]): value for key, value in quality.items() if ": adherence, " in key}
    best = max(scores, key=lambda cfg: scores[cfg])
    assert scores[best] >= 0.85
    monkeypatch.setattr(edit_stages, "CFGS", (best,))
    monkeypatch.setattr(edit_stages, "EDITS", 28)
    found = edit_stages.editor_quality(folder)
    assert next(value for key, value in found.items() if key.startswith("adherence, ")) >= 0.6
    assert next(value for key, value in found.items() if key.startswith("change elsewhere")) <= 0.04
    assert found["oracle on edits"] >= 0.9
