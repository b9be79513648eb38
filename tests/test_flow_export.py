"""An exported few-step SD3, FLUX.1 or Qwen-Image in stock diffusers: the student's times, the student's images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from flow_models import FAMILIES, save_flow
from torch import Tensor

from train_t2i.__main__ import main
from train_t2i.inference import flow_scheduler
from train_t2i.schedule import RectifiedFlow

PROMPTS, SEEDS = ["a red circle", "a large blue square left of a small green cross"], [3, 4]


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


def stock(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(
    pipe: Any, latents: Tensor, renoise: list[Tensor], monkeypatch: Any, **call: Any
) -> tuple[Tensor, list[float]]:
    """(images, times at the network's input, in [0, 1]) of a stock call with our noises."""
    import diffusers.schedulers.scheduling_flow_match_euler_discrete as euler

    times: list[float] = []
    unit = 1000 if type(pipe).__name__ == "StableDiffusion3Pipeline" else 1

    def keep(net: Any, given: Any, named: dict[str, Any]) -> None:
        times.append(float(named["timestep"][0]) / unit)

    pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    waiting = iter(renoise)
    monkeypatch.setattr(euler, "randn_tensor", lambda shape, **options: next(waiting, torch.zeros(shape)))
    made = pipe(PROMPTS, latents=latents, output_type="pt", **call).images
    monkeypatch.undo()
    assert next(waiting, None) is None, "not every re-noising was drawn"
    return made, times


@pytest.mark.parametrize("sample_type", ["ode", "sde"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_diffusers_makes_the_same_images(
    name: str, sample_type: str, folders: dict[str, Path], prompts_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from train_t2i.families.flow import pack
    from train_t2i.randomness import seeded_noise
    from train_t2i.student import RENOISE_OFFSET, load_student

    num_steps = 4 if name == "sd3" else 2
    flags = (
        f"--use-lora-gen --sample-num-steps {num_steps} --sample-type {sample_type} --shift 3 --text-length 24 "
        "--cfg-r 2 --resolution 64"
    )
    run = tiny_runs.train(tmp_path, "run", flags, model=folders[name], prompts=prompts_file)
    model = load_student(str(run))
    ours = model.images(PROMPTS, SEEDS)
    out = tmp_path / "pipeline"
    assert main(["export", str(run), "--out", str(out)]) == 0
    call = json.loads((out / "recommended.json").read_text())
    assert call["num_inference_steps"] == num_steps
    assert call["max_sequence_length"] == 24

    def shaped(x: Tensor) -> Tensor:
        return x if name == "sd3" else pack(x)

    noises = [seeded_noise([seed + i * RENOISE_OFFSET for seed in SEEDS], model.latent_shape) for i in range(num_steps)]
    renoise = [shaped(x) for x in noises[1:]] if sample_type == "sde" else []
    theirs, times = stock_images(stock(out), shaped(noises[0]), renoise, monkeypatch, **call)
    torch.testing.assert_close(torch.tensor(times), model.family.path.grid(num_steps)[:-1], rtol=0, atol=2e-6)
    assert theirs.shape == ours.shape
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    teacher = model.family.load(torch.float32).state_dict()
    exported = type(model.family).Transformer.from_pretrained(out, subfolder="transformer").state_dict()
    assert teacher.keys() == exported.keys()
    assert any(not torch.equal(teacher[key], exported[key]) for key in teacher), "the generator is the teacher's"
