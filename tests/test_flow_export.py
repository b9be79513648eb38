"""An exported few-step SD3, FLUX.1 or Qwen-Image in stock diffusers: the student's times, the student's images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny_runs
import torch
from flow_models import FAMILIES, save_flow

from train_t2i.__main__ import main
from train_t2i.inference import flow_scheduler
from train_t2i.schedule import RectifiedFlow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: save_flow(root / name, name) for name in FAMILIES}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0, 5.0, 12.0])
def test_a_scheduler_that_chooses_its_own_times_chooses_ours(num_steps: int, shift: float) -> None:
    """As SD3's pipeline uses it: the mu that it works out, and no sigmas."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    grid = RectifiedFlow(shift).grid(num_steps)
    scheduler = flow_scheduler(grid, shift, "ode", evenly_spaced=False)
    scheduler = type(scheduler).from_config(json.loads(scheduler.to_json_string()))  # as from a folder
    config = scheduler.config
    mu = {}
    if config.use_dynamic_shifting:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = {"mu": calculate_shift(1000, *(config[name] for name in names))}
    scheduler.set_timesteps(num_steps, **mu)
    torch.testing.assert_close(scheduler.sigmas, grid, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sample_type", ["ode", "sde"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_diffusers_makes_the_same_images(
    name: str, sample_type: str, folders: dict[str, Path], prompts_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from diffusers import DiffusionPipeline

    from train_t2i.student import load_student

    num_steps = 4 if name == "sd3" else 2
    flags = (
        f"--use-lora-gen --sample-num-steps {num_steps} --sample-type {sample_type} --shift 3 --text-length 24 "
        "--cfg-r 2 --resolution 64"
    )
    run = tiny_runs.train(tmp_path, "run", flags, model=folders[name], prompts=prompts_file)
    model = load_student(str(run))
    out = tmp_path / "pipeline"
    assert main(["export", str(run), "--out", str(out)]) == 0
    call = json.loads((out / "recommended.json").read_text())
    assert call["num_inference_steps"] == num_steps
    assert call["max_sequence_length"] == 24

    print(name, sample_type, stock.assert_same(DiffusionPipeline.from_pretrained(out), model, monkeypatch, call))
    teacher = model.family.load(torch.float32).state_dict()
    exported = type(model.family).Transformer.from_pretrained(out, subfolder="transformer").state_dict()
    assert teacher.keys() == exported.keys()
    assert any(not torch.equal(teacher[key], exported[key]) for key in teacher), "the generator is the teacher's"
