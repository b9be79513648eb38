"""How exported weights are sampled: the scheduler and the call, for a folder and for the header of a file.

A header's entries are text.  ``distill.sigmas`` are what samplers of sigmas are given (``ManualSigmas`` of ComfyUI):
t for rectified flow, sqrt((1 - abar) / abar) for SDXL, and 0 at the end; ``distill.timesteps`` are the times that the network
is told, in thousandths.  Titles and digests are named as in Stability AI's model metadata standard (``modelspec``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.inference import many_step_scheduler, noise_levels, student_scheduler
from train_t2i.student import ImageModel


@dataclass(frozen=True)
class Recipe:
    """``call`` is what a stock pipeline is told beside the prompt; ``header`` is all of it, for a file of weights."""

    scheduler: Any
    call: dict[str, Any]
    header: dict[str, str]


def recipe_of(model: ImageModel) -> Recipe:
    """Raises UserError where no scheduler's config can say the student's times."""
    run, family = model.settings.run, model.family
    supervised = run.method == "sft"
    scheduler = many_step_scheduler(model) if supervised else student_scheduler(model)
    num_steps = run.teacher_num_steps if supervised else run.sample_num_steps
    grid = family.path.dense_grid(num_steps) if supervised else family.path.grid(num_steps)
    height_px, width_px = model.settings.size_px
    options = family.call_options(run.teacher_cfg if supervised else 0.0)
    call = {"num_inference_steps": num_steps, **options, "height": height_px, "width": width_px}
    guidance = {name: value for name, value in options.items() if name in ("guidance_scale", "true_cfg_scale")}
    timesteps, sigmas = noise_levels(family.path, grid)
    said = {
        "distill.steps": num_steps,
        "distill.timesteps": timesteps,
        "distill.sigmas": sigmas,
        "distill.guidance": guidance,
        "distill.scheduler": json.loads(scheduler.to_json_string()),
        "distill.base_model": published_name(run.pretrained_model),
        "modelspec.title": f"{run.model_family}, {num_steps} step{'s' * (num_steps != 1)}",
        "modelspec.usage_hint": ", ".join(f"{name}={value}" for name, value in call.items()),
    }
    return Recipe(scheduler, call, header_of(said))


def header_of(said: Mapping[str, Any]) -> dict[str, str]:
    """The values of a safetensors header are text: what is none already becomes JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in said.items()}


def published_name(model: str) -> str:
    """Of the base model: its hub id, or of a local path the last name, since files are passed on and paths are private."""
    return Path(model).resolve().name if Path(model).exists() else model
