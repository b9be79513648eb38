"""The card of an exported folder: its metadata, its call (which is run), and what must not be in it."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import tiny_runs
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from PIL import Image
from tiny_runs import RL, refused

from train_t2i import terms
from train_t2i.__main__ import main
from train_t2i.card import Card, public_settings, table_part, terms_part
from train_t2i.card_usage import Usage
from train_t2i.config import METHOD_CONFIGS, Config, DMDRConfig, Settings, fields_of
from train_t2i.export.recipe import Recipe

NASTY = "](http://x) <script>alert(1)</script> | `"


@pytest.fixture(scope="module")
def stage(tmp_path_factory, runs, sdxl_folder, prompts_file, towers):
    """A run with rewards that goes on from another one's first step, its sample prompts not harmless."""
    root = tmp_path_factory.mktemp("stage")
    (root / "p.txt").write_text(f"a red circle\n{NASTY}\n")
    before = runs["four"] / "checkpoints" / "torch_units" / "step-1.pt"
    more = f"--resume-ckpt {before} --sample-num-steps 4 --sample-prompts {root / 'p.txt'} " + RL.format(**towers)
    return tiny_runs.train(root, "stage", more, model=sdxl_folder, prompts=prompts_file)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, stage):
    root = tmp_path_factory.mktemp("exported")
    asked = {"count": 500, "seed": 1000}
    rows = [
        {"model": "teacher", "clip": 0.5, "count": 500, "ci": {}, "scorers": {"reference": "/home/me/CANARY"}},
        {"model": "earlier", "clip": 0.25, **asked, "run": str(stage), "step": 1},
        {"model": "stage", "clip": 0.625, "kid": None, "network_calls": 4, **asked, "run": f"{stage}/", "step": 2},
        {"model": NASTY, "clip": 0.75, "count": 500, "ci": {"clip": [0.7, 0.8]}, "run": "/home/me/CANARY", "step": 2},
    ]
    (root / "table.json").write_text(json.dumps(rows))
    out = root / "my-student"
    arguments = ["export", str(stage), "--out", str(out), "--table", str(root / "table.json"), "--dtype", "bf16"]
    assert main([*arguments, "--push", "org/my-student", "--dry-run"]) == 0
    return out


@pytest.fixture(scope="module")
def card(exported):
    return ModelCard.load(exported / "README.md")


def test_its_metadata_are_the_hubs(card, exported):
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"text-to-image", "diffusers", "few-step"} <= set(data.tags)
    assert data.base_model is None  # one that nobody published
    assert [picture["text"] for picture in data.widget] == ["a red circle", NASTY]
    for picture in data.widget:
        with Image.open(exported / picture["output"]["url"]) as image:
            assert (image.format, image.size) == ("JPEG", (32, 32))


def test_its_own_row_of_the_table_is_the_hubs_model_index(card):
    """As huggingface_hub reads it back: of this step of this run, and of no other row."""
    assert card.data.model_name == "my-student"
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-to-image", "clip", 0.625)
    assert result.dataset_name == "500 prompts, first seed 1000"


def test_its_call_runs_and_is_the_recommended_one(card, exported, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    call = json.loads((exported / "recommended.json").read_text())
    assert "".join(f", {name}={value!r}" for name, value in call.items()) in code
    assert '"org/my-student"' in code
    monkeypatch.chdir(exported.parent)
    names: dict = {}
    exec(code.replace('"org/my-student"', '"my-student"'), names)  # noqa: S102 - our own words
    assert names["image"].size == (32, 32)
    assert str(names["pipe"].unet.dtype) == "torch.bfloat16"
    assert names["pipe"].scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_it_tells_no_place_of_this_machine(exported, stage, card):
    text = (exported / "README.md").read_text()
    assert "CANARY" not in text
    for place in (stage.parent, exported.parent, stage.parents[1]):
        assert str(place) not in text
    assert "<script>" not in card.text  # but in the metadata, where nothing is markup
    assert "`" not in card.text.replace("```", "").replace(r"\`", "")[: card.text.index("## How")]


def test_settings_that_are_words_are_left_out():
    """Every field that takes a word holds one here that must not be told."""
    for name in METHOD_CONFIGS:
        words = {
            field.name: "/home/me/CANARY"
            for field in fields_of(name).values()
            if isinstance(field.default, str | None) and not field.metadata["choices"] and field.name != "resolution"
        }
        own = {field.name for field in dataclasses.fields(METHOD_CONFIGS[name])}
        settings = Settings(
            Config(method=name, **{key: value for key, value in words.items() if key not in own}),
            METHOD_CONFIGS[name](**{key: value for key, value in words.items() if key in own}),
        )
        assert {"pretrained_model", "data_path_train", "output_dir"} <= words.keys()
        told = public_settings(settings)
        assert "CANARY" not in json.dumps(told)
        assert {"learning_rate_gen", "batch_size", "resolution", "mixed_precision", "max_train_steps"} <= told.keys()
        assert not {"num_workers", "checkpoint_steps"} & told.keys()


def test_it_shows_the_table_and_both_stages(card):
    assert r"| teacher | - | 0.5 |" in card.text
    assert "| 0.75 (0.7 to 0.8) |" in card.text
    assert "500 prompts a model" in card.text
    assert card.text.count("<details><summary>Settings") == 2
    assert "Settings of the stage before it, dmdr" in card.text
    assert "2 generator updates" in card.text
    assert "4 network calls" in card.text
    assert "reward clip" in card.text
    assert "earlier stage of this run was not at hand" not in card.text


def test_the_dry_run_lists_the_card(exported, stage, tmp_path, capsys):
    arguments = ["export", str(stage), "--out", str(tmp_path / "p"), "--push", "org/n", "--dry-run"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("README.md", "recommended.json", "model_index.json", "images/sheet.jpg", "images/00.jpg"):
        assert f"  {name}\n" in said
    assert "None was given to the export" in (tmp_path / "p" / "README.md").read_text()
    assert "--table" in refused(capsys, "export", stage, "--table", tmp_path / "none.json")
    assert "--dry-run without --push" in refused(capsys, "export", stage, "--dry-run")


@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_a_lora_has_a_card_of_its_own(to, runs, sdxl_folder, tmp_path, monkeypatch, capsys):
    """It is an adapter of its base; its code loads it onto that and makes its image."""
    run = runs["lora"]
    row = {"model": "lora", "hps": 0.5, "count": 2, "seed": 1000, "run": str(run), "step": 2}
    (tmp_path / "table.json").write_text(json.dumps([row]))
    monkeypatch.setattr(
        terms, "built_on", lambda *known: [("base model", terms.Origin("b", "org/base", "MIT", {"license": "mit"}))]
    )
    arguments = [
        "export",
        str(run),
        "--to",
        to,
        "--out",
        str(tmp_path / "my-lora"),
        "--push",
        "org/my-lora",
        "--dry-run",
    ]
    assert main([*arguments, "--table", str(tmp_path / "table.json")]) == 0
    said = capsys.readouterr().out
    for name in ("README.md", "recommended.json", "pytorch_lora_weights.safetensors", "images/sheet.jpg"):
        assert f"  {name}\n" in said
    card = ModelCard.load(tmp_path / "my-lora" / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == ("org/base", "adapter", "mit")
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"lora", "text-to-image", "diffusers"} <= set(data.tags)
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("hps", 0.5)]
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(code.replace("org/base", str(sdxl_folder)).replace("org/my-lora", "my-lora"), names)  # noqa: S102 - our own words
    assert names["image"].size == (32, 32)
    assert names["pipe"].scheduler.timesteps.tolist() == [399]
    assert len(names["pipe"].get_list_adapters()["unet"]) == 1
    assert "Not for ComfyUI" in card.text  # one step of SDXL
    assert "--push does not go with --to merged" in refused(capsys, "export", run, "--to", "merged", "--push", "org/n")


def test_a_card_says_what_other_programs_are_told():
    """Of SD3, whose kohya names diffusers does not read, there is no code; guidance that is none is CFG 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    header = {"distill.sigmas": "[1.0, 0.75, 0.0]", "distill.base_model": "base"}
    recipe = Recipe(scheduler, {"num_inference_steps": 2, "guidance_scale": 0.0}, header)
    text = Usage("org/n", "kohya", "sd3", recipe, "float32", None).text()
    assert "```" not in text
    assert "CFG 1, sampler `lcm`, `ManualSigmas` 1, 0.75, 0." in text
    told = Recipe(FlowMatchEulerDiscreteScheduler(), {"num_inference_steps": 2, "guidance_scale": 3.5}, header)
    assert "CFG 1, guidance 3.5, sampler `euler`" in Usage("org/n", "lora", "flux", told, "float32", None).text()
    edit = Recipe(FlowMatchEulerDiscreteScheduler(), {"num_inference_steps": 9, "true_cfg_scale": 4.0}, header)
    text = Usage("org/n", "lora", "qwen_image_edit", edit, "float32", None).text()
    assert "CFG 4, sampler" in text
    assert 'from_pretrained("base"' in text
    assert "docs/supervised.md" in text


# -- terms -----------------------------------------------------------------------------------------------------------


def test_origins_are_those_of_the_manifest(tmp_path):
    manifest = terms.read()
    by_id = terms.origin("stabilityai/stable-diffusion-xl-base-1.0", manifest)
    local = terms.origin("/data/models/stable-diffusion-xl-base-1.0", manifest)
    assert by_id == local
    assert by_id.repository == "stabilityai/stable-diffusion-xl-base-1.0"
    assert by_id.metadata == {"license": "openrail++"}
    flux = terms.origin("black-forest-labs/FLUX.1-dev", manifest)
    assert flux.metadata == {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev",
    }
    ode = manifest["dmd2-ode-init"]["local_name"]
    assert terms.origin(f"/somewhere/{ode}", manifest).licence == "CC-BY-NC-4.0"
    assert terms.origin("org/unheard-of", manifest) == terms.Origin(
        "org/unheard-of", "org/unheard-of", terms.UNKNOWN, {}
    )
    assert "/home" not in str(terms.origin("/home/me/model", manifest))
    with_card = tmp_path / "model"
    with_card.mkdir()
    (with_card / "README.md").write_text("---\nlicense: mit\n---\n")
    assert terms.origin(str(with_card), manifest).metadata == {"license": "mit"}
    (with_card / "README.md").write_text("---\nlicense: [\n---\n")
    assert terms.origin(str(with_card), manifest).metadata == {}


def test_every_teacher_of_the_manifest_has_a_licence_for_the_hub():
    for name, entry in terms.read().items():
        if entry["what"].startswith("teacher"):
            assert terms.hub_terms(entry), name


def test_what_every_stage_was_made_from_is_named():
    one = Settings(Config(xl_ode_pretrain_path="x/" + terms.read()["dmd2-ode-init"]["local_name"]), DMDRConfig())
    two = Settings(
        Config(), DMDRConfig(clip_reward_model="Apple_CLIP-H-14-224.bin", extra_rewards="0.1*my_module:secret_score")
    )
    built = terms.built_on([terms.Stage(two, {}), terms.Stage(one, {})], terms.read())
    assert [(role, found.name) for role, found in built] == [
        ("base model", "sdxl-base"),
        ("reward clip", "dfn5b-clip"),
        ("reward secret_score", "a function of one's own"),
        ("initial weights", "dmd2-ode-init"),
    ]
    text = terms_part(built, complete=False)
    assert "| initial weights | [tianweiy/DMD2](https://huggingface.co/tianweiy/DMD2) | CC-BY-NC-4.0 |" in text.replace(
        "\\", ""
    )
    assert "earlier stage" in text


def test_an_earlier_stage_that_is_gone_is_told(stage, runs):
    found, complete = terms.stages(str(stage), 2)
    assert [one.settings.run.exp_name for one in found] == ["stage", "four"]
    assert complete
    assert terms.stages(str(runs["one"]), 2)[1]
    record = runs["four"] / "checkpoints" / "torch_units" / "step-1.pt"
    whole = record.read_bytes()
    for left in (None, whole[: len(whole) // 2]):  # gone, then torn
        record.unlink()
        if left is not None:
            record.write_bytes(left)
        try:
            found, complete = terms.stages(str(stage), 2)
        finally:
            record.write_bytes(whole)
        assert [one.settings.run.exp_name for one in found] == ["stage"]
        assert not complete


def test_without_a_table_nothing_is_claimed():
    assert "None was given" in table_part([])


def test_its_samples_are_not_those_of_a_later_step(stage):
    for step in (1, 2):
        model = SimpleNamespace(run=str(stage), step=step)
        assert Card("a", model, None, "float32").sheet().step == step
