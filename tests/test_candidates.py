"""What can be evaluated: pipelines and folders of images are scored as the runs they came from; nothing is left out."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from tiny_runs import refused

from train_t2i.__main__ import main
from train_t2i.choice import IMAGE_LAYOUT_NAMES
from train_t2i.image_layouts import IMAGE_LAYOUTS, STYLES, Entry

TAGS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
     "prompt": "a photo of two dogs"},
]  # fmt: skip


@pytest.fixture
def sets(tmp_path, prompts_file):
    """Layout -> prompts."""
    styles = tmp_path / "benchmark"
    styles.mkdir()
    for i, style in enumerate(STYLES):
        (styles / f"{style}.json").write_text(json.dumps([f"{style} {k}" for k in range(2 + i)]))
    (styles / "drawbench.json").write_text('["no style"]')
    geneval = tmp_path / "evaluation_metadata.jsonl"
    geneval.write_text("".join(json.dumps(line) + "\n" for line in TAGS))
    return {"plain": prompts_file, "hpsv2": styles, "geneval": geneval}


def sample(run, out, *more):
    assert main(["sample", str(run), "--out", str(out), *map(str, more)]) == 0
    return out


def table(tmp_path, *arguments, name="table"):
    """(rows, pairs) of an evaluation."""
    out = tmp_path / "tables" / f"{name}.json"
    assert main(["evaluate", *map(str, arguments), "--out", str(out)]) == 0
    return json.loads(out.read_text()), json.loads(out.with_suffix(".paired.json").read_text())["pairs"]


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_flags_know_every_layout():
    assert tuple(IMAGE_LAYOUTS) == IMAGE_LAYOUT_NAMES


def test_hpsv2_finds_its_images(runs, tmp_path, sets):
    """As ``evaluate_benchmark`` looks: every name in the folder is a style, image i of it is STYLE/{i:05d}.jpg."""
    out = sample(runs["one"], tmp_path / "out", "--prompts", sets["hpsv2"], "--layout", "hpsv2", "--count", 3)
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(STYLES)
    for style in STYLES:
        prompts = json.loads((sets["hpsv2"] / f"{style}.json").read_text())[:3]
        found = sorted(path.name for path in (out / "images" / style).iterdir())
        assert found == [f"{i:05d}.jpg" for i in range(len(prompts))]
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"]) for line in lines[1:3]] == [
        ("images/anime/00001.jpg", "anime 1"), ("images/concept-art/00000.jpg", "concept-art 0"),
    ]  # fmt: skip
    with Image.open(out / "images" / "photo" / "00002.jpg") as image:
        assert image.format == "JPEG"


def test_a_jpeg_is_written_as_the_documents_say(tmp_path):
    """At quality 95 without chroma subsampling, byte by byte."""
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    name = IMAGE_LAYOUTS["hpsv2"].write(tmp_path, Entry("a", "photo/00000"), 0, picture)
    picture.save(tmp_path / "expected.jpg", quality=95, subsampling=0)
    assert (tmp_path / name).read_bytes() == (tmp_path / "expected.jpg").read_bytes()


def test_geneval_finds_its_images(runs, tmp_path, sets):
    """As ``evaluate_images.py`` looks: folders of digits, one JSON object in metadata.jsonl, samples of digits."""
    flags = ["--prompts", sets["geneval"], "--layout", "geneval", "--samples-per-prompt", 4]
    out = sample(runs["one"], tmp_path / "out", *flags)
    folders = sorted(path for path in out.iterdir() if path.is_dir() and path.name.isdigit())
    assert [path.name for path in folders] == ["00000", "00001"]
    for folder, line in zip(folders, TAGS, strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == [f"{i:04d}.png" for i in range(4)]
        assert all(re.match(r"\d+\.png", name) for name in names)
    files = [(folder / "samples" / f"{i:04d}.png").read_bytes() for folder in folders for i in range(4)]
    assert len(set(files)) == 8  # each from a noise of its own


@pytest.mark.parametrize(("layout", "samples"), [("plain", 2), ("hpsv2", 1), ("geneval", 2)])
def test_a_folder_is_scored_as_the_run_that_made_it(runs, tmp_path, sets, towers, layout, samples):
    flags = ["--prompts", sets[layout], "--layout", layout, "--samples-per-prompt", samples, "--seed", 9, "--count", 3]
    folder = sample(runs["one"], tmp_path / "images-of-one", *flags)
    scorers = ["--rewards", f"clip={towers['clip']},hpsv2={towers['hpsv2']}", "--held-out-model", towers["clip"]]
    rows, pairs = table(tmp_path, runs["one"], folder, *flags, *scorers)
    made, read = rows
    assert (made["model"], read["model"], read["run"]) == ("one@2", "images-of-one", str(folder))
    assert read["network_calls"] is None
    assert read["ms_per_image"] is None
    near = 2e-2 if layout == "hpsv2" else 1e-4  # a JPEG is not quite its image
    for score in ("clip", "hps", "held_out", *(["diversity"] if samples > 1 else [])):
        assert read[score] == pytest.approx(made[score], abs=near), score
        assert (read["ci"][score][0] == read["ci"][score][1]) is False
    (pair,) = pairs
    assert (pair["a"], pair["b"], pair["same_noise"]) == ("one@2", "images-of-one", True)
    assert pair["count"] == made["count"] == {"plain": 3, "hpsv2": 2 + 3 + 3 + 3, "geneval": 2}[layout]
    assert all(abs(apart["mean"]) < near for apart in pair["differences"].values())
    (folder / "prompts.jsonl").unlink()  # as other programs leave their folders: nobody knows the noise
    _, (pair,) = table(tmp_path, runs["one"], folder, *flags, *scorers, name="foreign")
    assert pair["same_noise"] is None


def test_diversity_is_that_of_the_images_of_a_prompt(runs, tmp_path, prompts_file, towers):
    import rewards
    from train_t2i import metrics
    from train_t2i.student import load_student

    flags = ["--prompts", prompts_file, "--count", 3, "--samples-per-prompt", 2, "--held-out-model", towers["clip"]]
    (row,), _ = table(tmp_path, runs["one"], *flags, "--batch-size", 2)
    prompts = prompts_file.read_text().splitlines()[:3]
    made = load_student(str(runs["one"])).images(prompts * 2, list(range(1000, 1006)))
    features = rewards.REWARDS["clip"](towers["clip"]).encode_images((made * 255).round() / 255)
    apart = metrics.spread(torch.stack([features[:3], features[3:]]))
    assert row["diversity"] == pytest.approx(float(apart.mean()), rel=1e-2)
    assert row["count"] == 3
    assert row["samples_per_prompt"] == 2


# -- pipelines -------------------------------------------------------------------------------------------------------


def test_an_exported_pipeline_is_scored_as_its_run(runs, tmp_path, prompts_file, towers):
    folder = tmp_path / "stock"
    assert main(["export", str(runs["one"]), "--out", str(folder)]) == 0
    flags = ["--prompts", prompts_file, "--count", 4, "--rewards", f"clip={towers['clip']}"]
    (ours, stock), (pair,) = table(tmp_path, runs["one"], folder, *flags)
    assert stock["model"] == "stock"
    assert stock["network_calls"] == ours["network_calls"] == 1
    assert stock["ms_per_image"] > 0
    assert stock["clip"] == pytest.approx(ours["clip"], abs=1e-4)
    assert pair["same_noise"] is True
    assert max(abs(end) for end in pair["differences"]["clip"]["ci"]) < 1e-3  # image by image


def test_guided_calls_of_a_pipeline_count_twice(tmp_path, sdxl_folder, prompts_file):
    folder = tmp_path / "teacher-folder"
    shutil.copytree(sdxl_folder, folder)
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 32, "width": 32}
    (folder / "recommended.json").write_text(json.dumps(call))
    (row,), _ = table(tmp_path, folder, "--prompts", prompts_file, "--count", 3, "--batch-size", 2)
    assert row["network_calls"] == 6
    assert row["scorers"]["resolution"] == "32x32"


# -- mistakes --------------------------------------------------------------------------------------------------------


def images(folder, names, size=(32, 32)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
    return folder


def test_a_missing_image_is_named_before_anything_loads(tmp_path, capsys, sets, monkeypatch):
    from train_t2i import scorers

    monkeypatch.setattr(scorers, "Scorers", lambda config: pytest.fail("scorers were asked for"))
    plain = images(tmp_path / "plain", ["00000.png", "00001.jpg"])
    told = refused(capsys, "evaluate", plain, "--prompts", sets["plain"], "--count", 3)
    assert f"{plain}/00002.png: no such image" in told
    styles = images(tmp_path / "styles", ["anime/00000.jpg", "concept-art/00000.jpg"])
    told = refused(capsys, "evaluate", styles, "--prompts", sets["hpsv2"], "--layout", "hpsv2")
    assert f"{styles}/anime/00001.jpg: no such image" in told
    assert "anime 1" in told
    geneval = images(tmp_path / "geneval", ["00000/samples/00000.png"])  # five digits, as its own program numbers
    told = refused(capsys, "evaluate", geneval, "--prompts", sets["geneval"], "--layout", "geneval")
    assert f"{geneval}/00000/metadata.jsonl: no such file" in told
    (geneval / "00000" / "metadata.jsonl").write_text(json.dumps(TAGS[0]))
    told = refused(capsys, "evaluate", geneval, "--prompts", sets["geneval"], "--layout", "geneval")
    assert f"{geneval}/00001/samples/0000.png: no such image" in told
    (geneval / "00000" / "metadata.jsonl").write_text(json.dumps(TAGS[1]))
    told = refused(capsys, "evaluate", geneval, "--prompts", sets["geneval"], "--layout", "geneval")
    assert "of another prompt" in told


def test_images_of_other_prompts_are_refused(runs, tmp_path, capsys, sets):
    folder = sample(runs["one"], tmp_path / "out", "--prompts", sets["plain"], "--count", 3)
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(sets["plain"].read_text().splitlines(keepends=True)[:3])))
    told = refused(capsys, "evaluate", folder, "--prompts", other, "--count", 3)
    assert f"{folder}/00000.png: made for" in told
    images(folder, ["00001.png"], size=(32, 48))
    told = refused(capsys, "evaluate", folder, "--prompts", sets["plain"], "--count", 3)
    assert f"{folder}/00001.png: 32x48 px, the first is 32x32" in told


def test_mistakes_of_prompt_sets(runs, tmp_path, capsys, sets):
    sample_one = ["sample", runs["one"], "--out", tmp_path / "out"]
    untagged, blank = tmp_path / "untagged.jsonl", tmp_path / "blank"
    untagged.write_text('{"prompt": "a dog"}\n')
    blank.mkdir()
    (blank / "photo.json").write_text('["a", " "]')
    for more, said in (
        (["--prompts", tmp_path, "--layout", "hpsv2"], "anime.json"),
        (["--prompts", blank, "--layout", "hpsv2"], "photo.json, row 2: a blank prompt"),
        (["--prompts", sets["plain"], "--layout", "geneval"], "evaluation_metadata.jsonl"),
        (["--prompts", untagged, "--layout", "geneval"], "untagged.jsonl:1: no tag"),
        (["--prompts", sets["hpsv2"], "--layout", "hpsv2", "--samples-per-prompt", 2], "1 image a prompt"),
        (["--prompt", "a", "--samples-per-prompt", 2], "go with --prompts"),
        (["--prompt", "a", "--layout", "geneval"], "go with --prompts"),
    ):
        assert said in refused(capsys, *sample_one, *more), more


def test_mistakes_of_pipelines(tmp_path, capsys, sdxl_folder, prompts_file):
    folder = tmp_path / "pipeline"
    shutil.copytree(sdxl_folder, folder)
    common = ["evaluate", folder, "--prompts", prompts_file, "--count", 2]
    assert "recommended.json: no such file" in refused(capsys, *common)
    call = folder / "recommended.json"
    for written, said in (
        ("[", "cannot be read"),
        ('{"num_inference_steps": 1}', "not a call with height and width"),
        ('{"height": 32, "width": 32, "generator": 1}', "generator is what an evaluation gives itself"),
        ('{"height": 32, "width": 32, "gidance_scale": 1}', "takes no gidance_scale"),
    ):
        call.write_text(written)
        assert said in refused(capsys, *common), written
    (folder / "pipeline.py").write_text("raise SystemExit")
    assert "code of its own" in refused(capsys, *common)
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "b" / "x").mkdir(parents=True)
    twice = ["evaluate", tmp_path / "a" / "x", tmp_path / "b" / "x", "--prompts", prompts_file]
    assert "two of the models are called x" in refused(capsys, *twice)
