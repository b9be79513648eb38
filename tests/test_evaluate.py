"""evaluate: rows, tables, reference features, times, mistakes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image
from tiny_runs import refused

from train_t2i.__main__ import main


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A module beside the person's own files; red is the mean of the red channel."""
    (tmp_path / "own_scorer.py").write_text(
        "seen = []\n"
        "def red(images, prompts):\n"
        "    seen.append(images)\n"
        "    return images[:, 0].mean((1, 2))\n"
        "def odd(images, prompts):\n    return images.mean()\n"
        "def picky(images, prompts):\n    raise ValueError('not a caption of this world')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_scorer", None)
    return "own_scorer:red"


@pytest.fixture
def reference(tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = ["image,prompt"]
    for i in range(6):
        noise = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        lines.append(f"{i}.png,noise")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder / "metadata.csv"


def test_a_row_holds_what_was_measured(runs, tmp_path, prompts_file, towers, scorer, reference, capsys):
    import rewards
    from train_t2i import metrics
    from train_t2i.pictures import fit_image
    from train_t2i.rows import load_rows
    from train_t2i.student import load_student

    out = tmp_path / "tables" / "table.json"
    arguments = [
        "evaluate", str(runs["four"]), "--name", "dmdr-4", "--prompts", prompts_file, "--count", 7, "--batch-size", 3,
        "--seed", 50, "--scorer", scorer, "--clip-reward-model", towers["clip"], "--hpsv2-reward-model", towers["hpsv2"],
        "--magic-prompt", "Realistic photo", "--held-out-model", towers["clip"], "--reference", reference, "--out", out,
        "--save-images", tmp_path / "grids",
    ]  # fmt: skip
    assert main([*map(str, arguments)]) == 0
    assert "dmdr-4" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())

    prompts = prompts_file.read_text().splitlines()[:7]
    made = load_student(str(runs["four"])).images(prompts, list(range(50, 57)))
    pictures = (made * 255).round() / 255
    clip = rewards.REWARDS["clip"](towers["clip"])
    hps = rewards.REWARDS["hpsv2"](towers["hpsv2"])
    features = clip.encode_images(pictures)
    real = clip.encode_images(torch.stack([fit_image(r.target, r.place, 32, 32) for r in load_rows(reference)]))
    scores = {
        "adherence": pictures[:, 0].mean((1, 2)),
        "clip": clip(pictures, prompts),
        "hps": hps(pictures, [f"Realistic photo {prompt}" for prompt in prompts]),
        "held_out": clip(pictures, prompts),
    }
    for name, values in scores.items():
        assert row[name] == pytest.approx(float(values.mean()), abs=1e-4), name
        low, high = metrics.bootstrap_ci(values, seed=50)
        assert row["ci"][name] == pytest.approx([low, high], abs=1e-3)
    assert row["frechet"] == pytest.approx(metrics.frechet(features, real), rel=1e-2, abs=1e-5)
    assert row["recall"] == pytest.approx(metrics.recall(features, real), abs=0.2)
    assert 0 <= row["precision"] <= 1
    assert row["ms_per_image"] > 0
    expected = {"model": "dmdr-4", "network_calls": 4, "count": 7, "seed": 50, "step": 2, "run": str(runs["four"])}
    assert {key: row[key] for key in expected} == expected
    assert (row["scorers"]["magic_prompt"], row["scorers"]["reference_count"]) == ("Realistic photo", 6)
    assert sorted(row["scorers"]["weights_xxh3"]) == ["clip", "held_out", "hps"]
    assert (tmp_path / "grids" / "dmdr-4.png").is_file()
    seen = torch.cat(sys.modules["own_scorer"].seen)
    assert torch.equal(seen, (seen * 255).round() / 255)  # what is scored is what a PNG holds
    assert seen.min() >= 0
    assert seen.max() <= 1


def test_rows_are_merged_by_model(runs, tmp_path, prompts_file, scorer, sdxl_folder):
    out = tmp_path / "table.json"
    common = ["--prompts", str(prompts_file), "--count", "2", "--scorer", scorer, "--out", str(out)]
    teacher = ["--teacher", "--pretrained-model", str(sdxl_folder), "--teacher-num-steps", "2", "--resolution", "32"]
    assert main(["evaluate", str(runs["one"]), str(runs["lora"]), *teacher, *common]) == 0
    rows = json.loads(out.read_text())
    assert [(row["model"], row["network_calls"]) for row in rows] == [("teacher", 4), ("one@2", 1), ("lora@2", 1)]
    assert all(row["clip"] is None and row["frechet"] is None for row in rows)
    named = ["--seed", "9", "--name", "one@2,another"]
    assert main(["evaluate", str(runs["one"]), str(runs["lora"]), *common, *named]) == 0
    assert main(["evaluate", str(runs["one"]), "--step", "1", *common]) == 0
    again = json.loads(out.read_text())
    assert [row["model"] for row in again] == ["teacher", "one@2", "lora@2", "another", "one@1"]
    assert (again[1]["seed"], again[3]["seed"]) == (9, 9)
    assert again[3]["run"] == again[2]["run"]
    assert [again[0], again[2]] == [rows[0], rows[2]]


def test_reference_features_are_kept_and_follow_their_images(tmp_path, towers, reference, monkeypatch):
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.scorers import Scorers

    config = EvaluateConfig(
        held_out_model=str(towers["clip"]), reference=str(reference), out=str(tmp_path / "t" / "table.json")
    )
    first = Scorers(config)
    first.features.prepare((32, 32))
    second = Scorers(config)
    monkeypatch.setattr("train_t2i.evaluation.features.encoded", None)  # must not be called
    second.features.prepare((32, 32))
    assert torch.equal(first.features.references["held_out"], second.features.references["held_out"])
    monkeypatch.undo()
    Image.new("RGB", (32, 32), "red").save(reference.parent / "0.png")
    third = Scorers(config)
    third.features.prepare((32, 32))
    assert not torch.equal(first.features.references["held_out"][0], third.features.references["held_out"][0])
    assert torch.equal(first.features.references["held_out"][1:], third.features.references["held_out"][1:])
    assert len(list((tmp_path / "t").glob("*.safetensors"))) == 2
    for file in (tmp_path / "t").glob("*.safetensors"):
        file.write_bytes(b"torn")  # made again rather than trusted
    fourth = Scorers(config)
    fourth.features.prepare((32, 32))
    assert torch.equal(third.features.references["held_out"], fourth.features.references["held_out"])


def test_the_reference_is_taken_at_the_size_of_each_model(tmp_path, towers, reference):
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.pictures import fit_image
    from train_t2i.rows import load_rows
    from train_t2i.scorers import Scorers

    out = str(tmp_path / "table.json")  # features are kept beside it
    scorers = Scorers(EvaluateConfig(held_out_model=str(towers["clip"]), reference=str(reference), out=out))
    for height, width in ((32, 32), (16, 32)):
        scorers.features.prepare((height, width))
        real = torch.stack([fit_image(row.target, row.place, height, width) for row in load_rows(reference)])
        expected = scorers.held_out.encode_images(real)
        torch.testing.assert_close(scorers.features.references["held_out"], expected, rtol=0, atol=1e-5)


def test_hps_of_other_words_is_another_score(towers):
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.scorers import Scorers

    paths = {"clip_reward_model": str(towers["clip"]), "hpsv2_reward_model": str(towers["hpsv2"])}
    plain, worded, same = (
        Scorers(EvaluateConfig(**paths, magic_prompt=words)) for words in ("", "Realistic photo", "Realistic photo")
    )
    assert plain.identity("hps") != worded.identity("hps") == same.identity("hps")
    assert plain.identity("clip") == worded.identity("clip")


def test_a_folder_is_a_reference_as_its_table_is(tmp_path, towers, reference):
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.scorers import Scorers

    by_table, by_folder = (
        Scorers(EvaluateConfig(held_out_model=str(towers["clip"]), reference=str(given))).features
        for given in (reference, reference.parent)
    )
    for features in (by_table, by_folder):
        features.prepare((32, 32))
    assert torch.equal(by_table.references["held_out"], by_folder.references["held_out"])


def test_mistakes_of_evaluate(runs, tmp_path, capsys, prompts_file, towers, scorer, reference):
    common = ["evaluate", runs["one"], "--prompts", prompts_file, "--count", 2]
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 1}')
    short = tmp_path / "short.txt"
    short.write_text("a\nb\n")
    for more, said in (
        (["--prompts", ""], "--prompts"),
        (["--prompts", tmp_path / "none.txt"], "none.txt"),
        (["--scorer", "own_scorer"], "is not module:function"),
        (["--scorer", "no_such_module:f"], "no_such_module"),
        (["--scorer", "own_scorer:none"], "none"),
        (["--scorer", "own_scorer:odd"], "one score an image"),
        (["--scorer", "own_scorer:picky"], "not a caption of this world"),
        (["--clip-reward-model", tmp_path / "none"], "none"),
        (["--reference", reference], "--held-out-model"),
        (["--reference-count", 3], "does nothing"),
        (["--magic-prompt", "x"], "does nothing"),
        (["--held-out-model", towers["clip"], "--reference", reference, "--prompts", short], "2 prompts"),
        (
            ["--held-out-model", towers["clip"], "--reference", reference, "--reference-count", 2, "--count", 5],
            "2 rows",
        ),
        (["--out", broken], "not a table"),
        (["--teacher", "--name", "x"], "--name x: 2 models"),
        (["--name", "x,y"], "--name x,y: 1 models"),
        ([runs["four"], "--name", "x,x"], "--name x,x: 2 models"),
        ([runs["four"], "--name", "x,"], "--name x,: 2 models"),
        ([runs["four"], "--name", "x,,y"], "--name x,,y: 2 models"),
        ([tmp_path / "no-run"], "no checkpoint"),
    ):
        assert said in refused(capsys, *common, *more), more


def test_where_rows_and_grids_go_is_tried_before_anything_loads(runs, tmp_path, capsys, prompts_file, monkeypatch):
    from train_t2i import evaluate
    from train_t2i.evaluation import candidates

    monkeypatch.setattr(candidates, "candidates", lambda *given: pytest.fail("models were asked for"))
    (tmp_path / "file").write_text("")
    common = ["evaluate", runs["one"], "--prompts", prompts_file, "--count", 2]
    for option, path in (
        ("--out", "file/table.json"),
        ("--out", "file/deep/table.json"),
        ("--save-images", "file"),
        ("--save-images", "file/grids"),
    ):
        assert f"{option} {tmp_path / path}: cannot be" in refused(capsys, *common, option, tmp_path / path)
    (tmp_path / "file").unlink()

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", lambda dir: full(dir))
    told = refused(capsys, *common, "--out", tmp_path / "new" / "table.json")
    assert "No space left on device" in told


def test_a_grid_that_cannot_be_saved_does_not_cost_the_row(runs, tmp_path, capsys, prompts_file, scorer, monkeypatch):
    from train_t2i import sample

    def full(images):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "square_grid", full)
    out = tmp_path / "table.json"
    arguments = ["--prompts", prompts_file, "--count", 2, "--out", out, "--save-images", tmp_path / "grids"]
    assert "--save-images" in refused(capsys, "evaluate", runs["one"], *arguments)
    assert [row["model"] for row in json.loads(out.read_text())] == ["one@2"]
