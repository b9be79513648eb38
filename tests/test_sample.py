"""sample: an image depends on its prompt and seed alone."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tiny_runs import pixels, refused

from train_t2i.__main__ import main


@pytest.mark.parametrize("name", ["one", "four"])
def test_an_image_depends_on_its_prompt_and_seed_alone(name, runs, tmp_path, prompts_file):
    common = ["sample", str(runs[name]), "--prompts", str(prompts_file), "--count", "5", "--seed", "7"]
    assert main([*common, "--out", str(tmp_path / "a"), "--batch-size", "5"]) == 0
    assert main([*common, "--out", str(tmp_path / "b"), "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()]
    prompts = prompts_file.read_text().splitlines()
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines] == [
        (f"{i:05d}.png", prompts[i], 7 + i) for i in range(5)
    ]
    alone = ["sample", "--run", str(runs[name]), "--prompt", prompts[3], "--seed", "10", "--count", "1"]
    assert main([*alone, "--out", str(tmp_path / "c")]) == 0
    for i in range(5):
        a, b = (pixels(tmp_path / folder / f"{i:05d}.png") for folder in "ab")
        assert (a - b).abs().max() <= 1  # kernels round by the size of the batch
    a, c = pixels(tmp_path / "a" / "00003.png"), pixels(tmp_path / "c" / "00000.png")
    assert (a - c).abs().max() <= 1
    assert (a - pixels(tmp_path / "a" / "00004.png")).abs().max() > 10
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.size == (2 * 34 + 2, 3 * 34 + 2)  # five images of 32 px in two columns


def test_steps_and_teacher_differ(runs, tmp_path, sdxl_folder):
    common = ["sample", "--prompt", "a red circle", "--count", "1"]
    for name, more in {
        "first": [str(runs["one"]), "--step", "1"],
        "last": [str(runs["one"]), "--step", "latest"],
        "teacher": [
            "--teacher",
            "--pretrained-model",
            str(sdxl_folder),
            "--resolution",
            "32",
            "--teacher-num-steps",
            "2",
        ],
    }.items():
        assert main([*common, *more, "--out", str(tmp_path / name)]) == 0
    first, last, teacher = (pixels(tmp_path / name / "00000.png") for name in ("first", "last", "teacher"))
    assert (first - last).abs().max() > 1
    assert (first - teacher).abs().max() > 1


def test_mistakes_of_sample(runs, tmp_path, capsys, prompts_file):
    run = runs["one"]
    assert "--prompts FILE or --prompt TEXT" in refused(capsys, "sample", run)
    assert "one of them" in refused(capsys, "sample", run, "--prompt", "a", "--prompts", prompts_file)
    assert "no model to work on" in refused(capsys, "sample", "--prompt", "a")
    assert "2 models" in refused(capsys, "sample", run, "--teacher", "--prompt", "a")
    assert "at least 1" in refused(capsys, "sample", run, "--prompt", "a", "--count", 0)
    assert "it has: 2, 1" in refused(capsys, "sample", run, "--prompt", "a", "--step", 5)
    (tmp_path / "prompts.jsonl").write_text("")
    assert "already holds samples" in refused(capsys, "sample", run, "--prompt", "a", "--out", tmp_path)
    assert "cannot be made" in refused(capsys, "sample", run, "--prompt", "a", "--out", tmp_path / "prompts.jsonl/x")
