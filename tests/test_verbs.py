"""What all verbs share: help, flags, mistakes, loading a run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import refused

from train_t2i import cli
from train_t2i.__main__ import VERBS, main
from train_t2i.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


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
    code = f"""
import sys
from train_t2i.__main__ import main
for verb in {list(VERBS)}:
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


@pytest.mark.parametrize("verb", ["sample", "evaluate", "export", "gallery", "report", "fetch", "pairs", "cache"])
def test_unknown_flags_and_bad_numbers_are_one_line(verb, capsys):
    assert "--nonsense" in refused(capsys, verb, "--nonsense")


def test_a_run_loads_no_library_that_it_does_not_use(tmp_path, sdxl_folder, prompts_file):
    """The first tick of a run waits for every import; each of these costs some of the ten seconds it may take."""
    flags = shlex.split(
        f"train --pretrained-model {sdxl_folder} --data-path-train {prompts_file} --output-dir {tmp_path} --resolution 32 "
        "--mixed-precision no --batch-size 1 --batch-size-test 1 --lora-rank 2 --max-train-steps 1 --ratio-update 1 "
        "--sample-steps 0 --checkpoint-steps 0 --cold-start-iter 9"
    )
    others = [f"train_t2i.families.{file}" for file, _ in FAMILIES.values() if file != "sdxl"]
    unused = [
        "open_clip",
        "timm",
        "deepspeed",
        "wandb",
        "tensorboard",
        "matplotlib",
        "datasets",
        *others,
    ]
    code = f"""
import sys
from train_t2i.__main__ import main
code = main({flags})
print("RESULT", code, [name for name in {unused} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "RESULT 0 []", done.stderr


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
