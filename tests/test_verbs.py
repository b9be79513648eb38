"""sample, evaluate, fetch, and what all verbs share: help, flags, mistakes, loading a run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from PIL import Image

from train_t2i import cli
from train_t2i.__main__ import VERBS, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sdxl_folder, prompts_file):
    root = tmp_path_factory.mktemp("runs")
    flags = {"one": "", "four": "--sample-num-steps 4", "lora": "--use-lora-gen"}
    return {
        name: tiny_runs.train(root, name, more, model=sdxl_folder, prompts=prompts_file) for name, more in flags.items()
    }


def refused(capsys, *arguments, code=2):
    assert main([*map(str, arguments)]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    told = said[said.index("error: ") :]  # a progress bar may stand before it
    assert len(told.splitlines()) <= 2
    return told


def pixels(path):
    import numpy as np

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).int()


# -- what all verbs share --------------------------------------------------------------------------------------------


def test_every_verb_has_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert f"python -m train_t2i {verb}" in said
        assert len(said) > 300


def test_help_answers_before_anything_heavy_loads():
    verbs = ["sample", "evaluate", "export", "report", "fetch"]
    code = f"""
import sys
from train_t2i.__main__ import main
for verb in {verbs}:
    try:
        main([verb, "--help"])
    except SystemExit:
        pass
print([name for name in ("torch", "diffusers", "matplotlib", "numpy") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_flags_of_verbs(monkeypatch):
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.pairs import PairsConfig

    parse = cli.parse_verb
    mixed = parse(EvaluateConfig, "evaluate", ["a", "--batch_size=3", "b", "--run", "c", "--teacher", "--run=d"])
    assert mixed.runs == ("a", "b", "c", "d")
    assert mixed.batch_size == 3
    assert mixed.teacher
    assert parse(EvaluateConfig, "evaluate", []).runs == ()
    monkeypatch.setitem(cli.ALIASES, "num_inference_steps", "count")  # its own flag wins over another's meaning
    assert parse(PairsConfig, "pairs", ["--num_inference_steps", "3"]).num_inference_steps == 3
    assert parse(PairsConfig, "pairs", ["--pretrained_model_name_or_path", "m"]).pretrained_model == "m"


@pytest.mark.parametrize("verb", ["sample", "evaluate", "export", "report", "fetch", "pairs"])
def test_unknown_flags_and_bad_numbers_are_one_line(verb, capsys):
    assert "--nonsense" in refused(capsys, verb, "--nonsense")


# -- loading a run ---------------------------------------------------------------------------------------------------


def test_a_run_whose_base_model_has_moved(runs, tmp_path, sdxl_folder, sdxl_folder_2):
    from train_t2i.errors import UserError
    from train_t2i.student import load_student

    moved = tmp_path / "elsewhere"
    moved.symlink_to(sdxl_folder)
    before = load_student(str(runs["lora"])).images(["a"], [1])
    assert torch.equal(load_student(str(runs["lora"]), pretrained_model=str(moved)).images(["a"], [1]), before)
    with pytest.raises(UserError, match="do not fit the base model"):
        load_student(str(runs["one"]), pretrained_model=str(sdxl_folder_2))


def test_images_need_none_of_the_files_that_training_needed(tmp_path, sdxl_folder, prompts_file, runs, towers):
    import shutil

    import tiny

    from train_t2i.student import load_student

    decoder = tiny.save_tiny_vae(tmp_path / "decoder")
    start = tmp_path / "start"
    shutil.copytree(runs["one"], start)
    rewards = f"--tiny-vae {decoder} --clip-reward-model {towers['clip']}"
    more = f"{rewards} --generator-init {start}/checkpoints/torch_units/step-2.pt"
    run = tiny_runs.train(tmp_path, "run", more, model=sdxl_folder, prompts=prompts_file)
    shutil.rmtree(decoder)
    shutil.rmtree(start)
    load_student(str(run))


@pytest.mark.parametrize("name", ["one", "four", "lora", "teacher"])
def test_half_precision_network_calls(name, runs, sdxl_folder, monkeypatch):
    """On a GPU weights and calls are in the run's format; the same path, in bf16 on the CPU, makes nearly the image."""
    from train_t2i import student
    from train_t2i.config import Config

    config = Config(pretrained_model=str(sdxl_folder), resolution="32")

    def images():
        model = student.load_teacher(config, 2, 3.0) if name == "teacher" else student.load_student(str(runs[name]))
        return model.images(["a red circle"], [1])

    exact = images()
    calls = []
    half = (torch.bfloat16, lambda: calls.append(1) or torch.autocast("cpu", dtype=torch.bfloat16))
    monkeypatch.setattr(student, "number_format", lambda *given: half)
    near = images()
    assert calls
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0, atol=0.15)


def test_number_formats():
    from train_t2i.student import number_format

    assert number_format("fp16", torch.device("cpu"))[0] == torch.float32
    dtype, autocast = number_format("bf16", torch.device("cuda"))
    assert dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="CUDA") if not torch.cuda.is_available() else autocast():
        autocast()


# -- sample ----------------------------------------------------------------------------------------------------------


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


# -- evaluate --------------------------------------------------------------------------------------------------------


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
    from train_t2i.data import fit_image, load_rows
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
    real = clip.encode_images(torch.stack([fit_image(r, 32, 32) for r in load_rows(reference)]))
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
    assert row["scorers"]["magic_prompt"] == "Realistic photo"
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
    assert main(["evaluate", str(runs["one"]), *common, "--seed", "9"]) == 0
    assert main(["evaluate", str(runs["one"]), "--step", "1", *common]) == 0
    again = json.loads(out.read_text())
    assert [row["model"] for row in again] == ["teacher", "one@2", "lora@2", "one@1"]
    assert again[1]["seed"] == 9
    assert [again[0], again[2]] == [rows[0], rows[2]]


def test_reference_features_are_kept_and_follow_their_images(tmp_path, towers, reference, monkeypatch):
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.scorers import Scorers

    config = EvaluateConfig(
        held_out_model=str(towers["clip"]), reference=str(reference), out=str(tmp_path / "t" / "table.json")
    )
    first = Scorers(config)
    first.prepare_reference((32, 32))
    second = Scorers(config)
    monkeypatch.setattr(Scorers, "features", None)  # must not be called
    second.prepare_reference((32, 32))
    assert torch.equal(first.reference, second.reference)
    monkeypatch.undo()
    Image.new("RGB", (32, 32), "red").save(reference.parent / "0.png")
    third = Scorers(config)
    third.prepare_reference((32, 32))
    assert not torch.equal(first.reference[0], third.reference[0])
    assert torch.equal(first.reference[1:], third.reference[1:])
    assert len(list((tmp_path / "t").glob("*.safetensors"))) == 2
    for file in (tmp_path / "t").glob("*.safetensors"):
        file.write_bytes(b"torn")  # made again rather than trusted
    fourth = Scorers(config)
    fourth.prepare_reference((32, 32))
    assert torch.equal(third.reference, fourth.reference)


def test_times_leave_the_warm_up_and_the_rest_out(monkeypatch):
    from train_t2i import evaluate
    from train_t2i.evaluate import EvaluateConfig, make_and_score

    class Nothing:
        held_out = None

        def scores(self, images, prompts):
            return {}

    def timed(model, prompts, seeds):
        made.append((len(prompts), seeds[0]))
        return torch.zeros(len(prompts), 3, 2, 2), float(len(made))

    monkeypatch.setattr(evaluate, "timed_images", timed)
    for count, batches, seconds in (
        (7, [(2, 0), (2, 2), (2, 4), (1, 6)], [2.0, 3.0]),
        (2, [(2, 0), (2, 0)], [2.0]),
        (3, [(2, 0), (2, 0), (1, 2)], [2.0]),
    ):
        made = []
        config = EvaluateConfig(batch_size=2, seed=0)
        kept = make_and_score(None, ["a"] * count, Nothing(), config, "x")
        assert made == batches
        assert kept.seconds_per_image == seconds
        assert kept.count == count


def test_mistakes_of_evaluate(runs, tmp_path, capsys, prompts_file, towers, scorer, reference):
    common = ["evaluate", runs["one"], "--prompts", prompts_file, "--count", 2]
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 1}')
    short = tmp_path / "short.txt"
    short.write_text("a\nb\n")
    for more, said in (
        (["--prompts", ""], "--prompts"),
        (["--prompts", tmp_path / "none.txt"], "none.txt"),
        (["--scorer", "own_scorer"], "not module:function"),
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
        (["--teacher", "--name", "x"], "--name"),
        ([tmp_path / "no-run"], "no checkpoint"),
    ):
        assert said in refused(capsys, *common, *more), more


def test_where_rows_and_grids_go_is_tried_before_anything_loads(runs, tmp_path, capsys, prompts_file, monkeypatch):
    from train_t2i import evaluate

    monkeypatch.setattr(evaluate, "chosen", lambda config: pytest.fail("models were asked for"))
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


# -- fetch -----------------------------------------------------------------------------------------------------------

WEIGHTS = b"weights of a tower"


@pytest.fixture
def manifest(tmp_path):
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    text = f"""
[real."tower-1.0"]
what = "a tower"
repository = "someone/towers"
repository_type = "model"
file = "deep/tower.bin"
revision = "abc"
local_name = "Tower.bin"
licence = "MIT"
sha256 = "{digest}"
[real.prompts]
repository = "someone/prompts"
repository_type = "dataset"
file = "prompts.txt"
[real.pipeline]
repository = "someone/pipeline"
local_name = "pipeline"
[real.rogue]
repository = "someone/rogue"
local_name = "../rogue"
file = "x"
[tiny.world]
what = "made here"
command = "python -m shapes.pretrain"
"""
    path = tmp_path / "manifest.toml"
    path.write_text(text)
    return path


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps to itself what it was asked; ``content`` is what it sends, or raises."""
    import huggingface_hub

    class Hub:
        content = WEIGHTS
        asked: list[dict] = []  # noqa: RUF012

    def download(**asked):
        Hub.asked.append(asked)
        if isinstance(Hub.content, Exception):
            raise Hub.content
        path = Path(asked["local_dir"]) / asked.get("filename", "unet/model.bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Hub.content)
        return str(path) if "filename" in asked else asked["local_dir"]

    Hub.asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return Hub


def test_fetch_downloads_checks_and_renames(manifest, hub, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["fetch", "tower-1.0", "prompts", "--out", str(out), "--manifest", str(manifest)]
    assert main(arguments) == 0
    assert (out / "Tower.bin").read_bytes() == WEIGHTS
    assert (out / "prompts.txt").is_file()
    said = capsys.readouterr().out
    assert "its sha256 is right" in said
    assert "no digest is known" in said
    asked = hub.asked[0]
    assert (asked["repo_id"], asked["filename"], asked["revision"]) == ("someone/towers", "deep/tower.bin", "abc")
    assert [a["repo_type"] for a in hub.asked] == ["model", "dataset"]
    assert sorted(path.name for path in out.iterdir() if path.name != ".fetch") == ["Tower.bin", "prompts.txt"]
    assert main(arguments) == 0  # nothing to do the second time
    assert len(hub.asked) == 2
    assert "already there, its sha256 is right" in capsys.readouterr().out


def test_fetch_of_a_folder(manifest, hub, tmp_path):
    assert main(["fetch", "--name", "pipeline", "--out", str(tmp_path / "o"), "--manifest", str(manifest)]) == 0
    assert (tmp_path / "o" / "pipeline" / "unet" / "model.bin").is_file()
    assert "*.bin" in hub.asked[0]["ignore_patterns"]


def test_a_wrong_digest_is_not_used(manifest, hub, tmp_path, capsys):
    hub.content = b"something else"
    common = ["fetch", "tower-1.0", "--out", tmp_path / "out", "--manifest", manifest]
    assert "sha256" in refused(capsys, *common)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (tmp_path / "out" / "Tower.bin").write_bytes(b"damaged since")
    assert "remove it" in refused(capsys, *common)


def test_fetch_without_names_lists(manifest, capsys):
    assert main(["fetch", "--manifest", str(manifest)]) == 0
    said = capsys.readouterr().out
    assert "tower-1.0" in said
    assert "someone/towers; MIT" in said
    assert "made here" in said


def test_mistakes_of_fetch(manifest, hub, tmp_path, capsys):
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    common = ["--manifest", manifest, "--out", tmp_path / "out"]
    assert "it has: tower-1.0" in refused(capsys, "fetch", "none", *common)
    assert "shapes.pretrain" in refused(capsys, "fetch", "world", *common)
    assert "leaves the folder" in refused(capsys, "fetch", "rogue", *common)
    assert "no such file" in refused(capsys, "fetch", "--manifest", tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[real")
    assert "cannot be read" in refused(capsys, "fetch", "--manifest", tmp_path / "bad.toml")
    for error in (
        LocalEntryNotFoundError("offline\nhere"),
        httpx.ConnectError("no route"),
        OSError(101, "unreachable"),
    ):
        hub.content = error
        assert "cannot be downloaded from someone/towers" in refused(capsys, "fetch", "tower-1.0", *common)
    hub.content = OSError(28, "No space left on device")
    assert "make room" in refused(capsys, "fetch", "tower-1.0", *common, code=5)
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, "fetch", "tower-1.0", "--manifest", manifest, "--out", tmp_path / "file")


def test_the_projects_own_manifest_is_read_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fetch"]) == 0
    said = capsys.readouterr().out
    assert "HPS_v2.1" in said or "hpsv2" in said
