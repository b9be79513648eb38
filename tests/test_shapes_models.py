"""The tiny models: what they are trained with, and that the committed ones are what the manifest says."""

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from shapes import autoencoder as ae
from shapes import degrade, denoiser, finetune, measure, parallel, pretrain, render, scenes, sdxl_stages, towers
from shapes.manifest import write_manifest
from shapes.muon import orthogonal
from shapes.tokenizer import new_tokenizer
from shapes.world import generator, load_world
from shapes.wrong_captions import mutate

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@pytest.fixture(scope="module")
def judged():
    return load_world("heldout", 5, 64)


# ------------------------------------------------------------------ what training uses
def test_cut_tokenizer_splits_captions_as_clip_does_and_takes_any_text():
    ours, theirs = new_tokenizer(), open_clip.SimpleTokenizer()
    for _, text in scenes.samples("eval", 0, 100):
        assert ours.tokenize(text) == [theirs.decoder[i] for i in theirs.encode(text)]
    odd = "Zürich 東京 <b> naïve-ness 1234 \U0001f600"
    ids = ours(odd).input_ids
    assert ours.decode(ids, skip_special_tokens=True).replace(" ", "") == odd.lower().replace(" ", "")
    assert max(ids) == ours.eos_token_id == len(ours) - 1  # CLIP pools where the number is highest


def test_wrong_captions_are_wrong_in_one_attribute_and_never_about_held_out_pairs():
    rng = np.random.default_rng(0)
    for scene, _ in scenes.samples("train", 1, 300):
        other = mutate(scene, rng)
        assert other != scene
        assert not scenes.has_held_out_pair(other)
        assert scenes.parse(scenes.caption(other)) == other


def test_orthogonal_is_the_polar_factor_to_first_order():
    m = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    ours = orthogonal(m)
    assert 0.6 < torch.linalg.svdvals(ours).min() <= torch.linalg.svdvals(ours).max() < 1.3
    assert torch.cosine_similarity(ours.flatten(), (u @ vt).flatten(), 0) > 0.97


def test_gradients_of_parts_add_up_to_that_of_the_whole():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    x = torch.randn(8, 5)
    layer(x).square().mean().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    value = parallel.backward(lambda part: layer(part).square().mean(), x.chunk(2), list(layer.parameters()))
    assert value == pytest.approx(layer(x).square().mean().item())
    for p, wanted in zip(layer.parameters(), expected):
        assert torch.allclose(p.grad, wanted, atol=1e-6)


def test_spoiled_pictures_are_pictures_and_repeat(judged):
    images = judged.images(torch.arange(24))
    for way in (degrade.light, degrade.wrong, degrade.poor):
        once, again = (way(images, generator(3, 1)) for _ in range(2))
        assert torch.equal(once, again)
        assert once.shape == images.shape
        assert 0 <= once.min() <= once.max() <= 1
    wrong = degrade.wrong(images, generator(0, 0))
    assert ae.retention(wrong, judged.captions[:24]) <= 0.35  # erasing or splicing an empty half changes nothing


class Stages:
    """Three stages that only write down that they were made: a <- b <- c."""

    def __init__(self, folder, monkeypatch):
        self.paths, self.made = pretrain.Paths(folder / "out", folder / "work"), []
        self.patch = monkeypatch
        self.recipe("first")

    def stage(self, name, recipe, needs):
        def make(paths, run_name):
            self.made.append(name)
            (paths.out / name).mkdir(exist_ok=True)
            return {"quality": 1.0}

        return pretrain.Stage(name, recipe, needs, lambda p: p.out / name, make)

    def recipe(self, first):
        stages = (self.stage("a", first, ()), self.stage("b", 2, ("a",)), self.stage("c", 3, ("b",)))
        self.patch.setattr(pretrain, "STAGES", stages)

    def go(self, *flags):
        self.made.clear()
        pretrain.main(["--out", str(self.paths.out), "--work", str(self.paths.work), *flags])
        return list(self.made)

    @property
    def record(self):
        return json.loads(self.paths.record.read_text())


@pytest.fixture
def stages(tmp_path, monkeypatch):
    return Stages(tmp_path, monkeypatch)


def test_a_stage_is_skipped_until_its_recipe_or_one_below_changes(stages):
    assert stages.go() == ["a", "b", "c"]
    assert stages.go() == []
    stages.recipe("other")
    assert stages.go() == ["a", "b", "c"]
    assert stages.record["b"]["measured"] == {"quality": 1.0}


def test_forcing_a_stage_forces_what_builds_on_it_and_removes_its_unfinished_run(stages):
    stages.go()
    runs = {stage.name: stages.paths.work / pretrain.run_name(stage) for stage in pretrain.STAGES}
    legs = {name: folder.with_name(f"{folder.name}-7000") for name, folder in runs.items()}
    for folder in (*runs.values(), *legs.values()):
        folder.mkdir()
    assert stages.go("--force", "b", "--only", "a") == ["b", "c"]
    for folders in (runs, legs):
        assert [name for name, folder in folders.items() if folder.exists()] == ["a"]


def test_what_was_built_on_a_replaced_stage_has_no_quality(stages):
    """The manifest would pair new weights with old numbers."""
    stages.go()
    (stages.paths.out / "b").rmdir()
    assert stages.go("--only", "b") == ["b"]
    assert set(stages.record) == {"a", "b"}


def test_an_interrupted_force_goes_on_without_it(stages, monkeypatch):
    stages.go()
    first, second, third = pretrain.STAGES
    monkeypatch.setattr(pretrain, "STAGES", (first, replace(second, make=lambda paths, run_name: 1 / 0), third))
    with pytest.raises(ZeroDivisionError):
        stages.go("--force", "a")
    stages.recipe("first")
    assert stages.go() == ["b", "c"]


@pytest.mark.parametrize(("stage", "maker"), [("hps", "clip"), ("flux-guidance", "flux")])
def test_a_stage_says_where_what_it_starts_from_comes_from(stage, maker, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["--out", str(tmp_path), "--work", str(tmp_path), "--force", stage, "--only", stage])
    assert caught.value.code == 2
    assert f"add --force {maker}, which makes it" in capsys.readouterr().err


def test_the_committed_models_are_of_the_recipes_that_stand_here(tmp_path):
    paths = pretrain.Paths(CHECKPOINTS, tmp_path)
    stale = pretrain.plan(paths, {stage.name for stage in pretrain.STAGES}, set())
    assert [stage.name for stage in stale if stage.output(paths).exists()] == []


def test_an_interrupted_render_is_made_again(tmp_path, monkeypatch):
    drawn = []

    def broken(scene, rng):
        drawn.append(scene)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return whole(scene, rng)

    whole = render.render
    monkeypatch.setattr(render, "render", broken)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_pictures("train", 5, 0, tmp_path)
    monkeypatch.setattr(render, "render", whole)
    assert not (tmp_path / "metadata.csv").exists()
    scenes.write_pictures("train", 5, 0, tmp_path)
    assert len((tmp_path / "metadata.csv").read_text().splitlines()) == 1 + len(list(tmp_path.glob("*.png"))) == 6


def test_every_recipe_of_the_denoiser_has_its_own_pictures_and_run(tmp_path, monkeypatch):
    """What differs must not go on from what is there."""
    commands = []
    monkeypatch.setattr(finetune.subprocess, "run", lambda command, check, env=None: commands.append(command))
    monkeypatch.setattr(finetune, "install", lambda trained, folder, kind: commands.append([str(trained)]))
    few = denoiser.DenoiserRecipe(pictures=4, steps=2)
    for recipe, name in ((few, "one"), (replace(few, pictures=5), "two"), (replace(few, seed=1), "three")):
        denoiser.train_denoiser(tmp_path, tmp_path, recipe, name)
    renders, trainings, installed = commands[::3], commands[1::3], commands[2::3]
    tables = [command[command.index("--data-path-train") + 1] for command in trainings]
    assert [f"{command[command.index('--out') + 1]}/metadata.csv" for command in renders] == tables
    assert len(set(tables)) == 3
    assert [command[command.index("--exp-name") + 1] for command in trainings] == ["one", "two", "three"]
    assert all(f"/{name}/" in trained for name, (trained,) in zip(("one", "two", "three"), installed, strict=True))


# ------------------------------------------------------------------ the committed models
def test_committed_files_have_the_digests_of_the_manifest_and_fit_the_budget():
    listed = tomllib.loads((CHECKPOINTS / "manifest.toml").read_text())
    total = 0
    for name, entry in listed["tiny"].items():
        for file, digest in entry["sha256"].items():
            data = (CHECKPOINTS / name / file).read_bytes()
            total += len(data)
            assert hashlib.sha256(data).hexdigest() == digest, f"{name}/{file}"
    assert set(listed["tiny"]) == {path.name for path in CHECKPOINTS.glob("tiny-*/")}
    assert {"tiny-sdxl", "tiny-taesd", "tiny-clip", "tiny-hps", "tiny-clip-heldout"} <= set(listed["tiny"])
    assert total <= 42e6
    for name in {"tiny-sd3", "tiny-flux", "tiny-qwen-image", "tiny-qwen-image-edit"} & set(listed["tiny"]):
        assert sum(file.stat().st_size for file in (CHECKPOINTS / name).rglob("*") if file.is_file()) <= 6e6


def test_what_was_written_by_hand_stays_in_the_manifest(tmp_path):
    committed = (CHECKPOINTS / "manifest.toml").read_text(encoding="utf-8")
    for folder in CHECKPOINTS.glob("tiny-*/"):
        (tmp_path / folder.name).symlink_to(folder)
    record = json.loads((CHECKPOINTS / "tiny-recipes.json").read_text())
    added = committed.replace('[real."taesdxl"]\n', '[real."taesdxl"]\nsha256 = "12" # of my download\n')
    for text in (committed, added):
        (tmp_path / "manifest.toml").write_text(text, encoding="utf-8")
        write_manifest(tmp_path, record)
        assert (tmp_path / "manifest.toml").read_text(encoding="utf-8") == text
    (tmp_path / "manifest.toml").unlink()
    write_manifest(tmp_path, record)
    assert set(tomllib.loads((tmp_path / "manifest.toml").read_text())) == {"tiny"}


def test_autoencoder_and_fast_decoder_keep_what_is_shown(judged):
    vae = measure.load_vae(CHECKPOINTS / "tiny-sdxl" / "vae")
    tiny = measure.load_tiny(CHECKPOINTS / "tiny-taesd")
    latents = ae.encode(vae, judged.images(torch.arange(64)))
    assert latents.shape == (64, 4, 8, 8)
    assert 0.9 < latents.std() < 1.1
    assert ae.retention(ae.decode(vae, latents), judged.captions) >= 0.95
    assert ae.retention(ae.decode_fast(tiny, latents), judged.captions) >= 0.9


def test_teacher_draws_what_it_is_told():
    from shapes.denoiser import load_pipeline, sample_teacher

    pipeline = load_pipeline(CHECKPOINTS / "tiny-sdxl")
    prompts = scenes.unique_captions("heldout", 0, 40)
    quality = tomllib.loads((CHECKPOINTS / "manifest.toml").read_text())["tiny"]["tiny-sdxl"]["measured"]
    best = max((key for key in quality if key.startswith("denoiser")), key=lambda key: quality[key])
    images = sample_teacher(pipeline, prompts, cfg=float(best.split()[-1]), steps=25)
    assert ae.retention(images, prompts) >= 0.8


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-hps", "tiny-clip-heldout"])
def test_towers_load_in_open_clip_and_know_right_from_wrong(name, judged):
    folder = CHECKPOINTS / name
    scores = measure.tower(folder, judged)
    assert scores["prefers the right word"] >= 0.85
    assert scores["prefers the whole picture"] >= 0.8
    stock = open_clip.create_model(f"local-dir:{folder}", pretrained=None)
    stock.load_state_dict(measure.load_tower(folder).state_dict())
    words = open_clip.get_tokenizer(f"local-dir:{folder}")(["a small red circle on the left on a grey background"])
    assert stock.encode_text(words).shape == (1, stock.text_projection.shape[1])


def test_towers_are_saved_for_the_whole_vocabulary_of_clip():
    ours, theirs = new_tokenizer(), open_clip.SimpleTokenizer()
    table = torch.randn(len(ours), 4, generator=torch.Generator().manual_seed(0))
    wide = towers.widen_vocabulary(table)
    for _, text in scenes.samples("heldout", 0, 100):
        assert torch.equal(wide[theirs(text)[0, : len(ours(text).input_ids)]], table[ours(text).input_ids])


def test_recipes_differ_where_they_must():
    assert sdxl_stages.HELD_OUT.seed != sdxl_stages.CLIP.seed
    assert sdxl_stages.HELD_OUT.vision != sdxl_stages.CLIP.vision
    changed = replace(pretrain.STAGES[0], recipe=replace(sdxl_stages.AUTOENCODER, seed=99))
    assert pretrain.digest(changed) != pretrain.digest(pretrain.STAGES[0])
