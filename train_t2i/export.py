"""``python -m train_t2i export RUN --to pipeline``: a run's generator as a folder that stock diffusers loads.

The folder holds everything: the generator with its LoRA merged in fp32, text encoders, tokenizers, VAE, and a scheduler
whose config alone makes ``StableDiffusionXLPipeline.from_pretrained(DIR)(prompt, num_inference_steps=N,
guidance_scale=0)`` visit the student's own times.  ``recommended.json`` says N, and the guidance.

``LCMScheduler`` re-noises its clean estimate at every step, as the student was trained (arXiv 2310.04378, algorithm 3).
With ``original_inference_steps=N`` its levels are the training grid's (999, 749, 499, 249 at four); one step at level
399 is a schedule of the first 400 betas with one step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.choice import RunChoice
from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError

if TYPE_CHECKING:
    from torch import nn

    from train_t2i.student import ImageModel

FORMATS = ("pipeline",)


@dataclass(frozen=True)
class ExportConfig(RunChoice):
    """Write a run's generator as a diffusers pipeline folder."""

    to: str = flag("pipeline", "what to write: pipeline (a StableDiffusionXLPipeline folder)")
    out: str | None = flag(None, "folder to write (default: RUN/pipeline/step-N)")
    pretrained_model: str | None = flag(None, "where the run's base model lies now, if it has moved")
    vae: str | None = flag(None, "VAE to use instead of the run's")
    dtype: str = flag("fp32", "number format of the saved weights", choices=("fp32", "fp16", "bf16"))


def merge_adapters(net: nn.Module) -> nn.Module:
    """Fold every LoRA into the layer it sits on, in the layer's own (fp32) format, and put the plain layer back."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True, adapter_names=list(layer.lora_A) or None)
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, layer.get_base_layer())
    return net


def student_scheduler(model: ImageModel) -> Any:
    """The LCMScheduler whose own times are the student's.  Raises UserError where no config can say them."""
    from diffusers import DDPMScheduler, LCMScheduler

    path: Any = model.family.path
    num_steps = model.settings.run.sample_num_steps
    base = DDPMScheduler.from_config(model.family.pipe.scheduler.config)  # type: ignore[attr-defined]
    grid = path.levels(path.grid(num_steps)[:-1]).tolist()
    known = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
    shared = {name: base.config[name] for name in known} | {"clip_sample": False}
    if num_steps == 1:
        betas = base.betas[: grid[0] + 1].double().tolist()
        made = LCMScheduler(**shared, num_train_timesteps=len(betas), trained_betas=betas, original_inference_steps=1)
    else:
        made = LCMScheduler(
            **shared, num_train_timesteps=base.config.num_train_timesteps, trained_betas=base.config.trained_betas,
            rescale_betas_zero_snr=base.config.rescale_betas_zero_snr, original_inference_steps=num_steps,
        )  # fmt: skip
    made.set_timesteps(num_steps)
    if made.timesteps.tolist() != grid:
        raise UserError(
            f"the student's times {grid} cannot be said in a scheduler's config (it would take "
            f"{made.timesteps.tolist()})",
            f"--shift {model.settings.run.shift} has no pipeline: sample with python -m train_t2i sample",
        )
    return made


def many_step_scheduler(model: ImageModel) -> Any:
    """A fine-tuned teacher's: deterministic, from pure noise."""
    from diffusers import DDIMScheduler

    config = model.family.pipe.scheduler.config  # type: ignore[attr-defined]
    return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)


def build_pipeline(model: ImageModel) -> tuple[Any, dict[str, Any]]:
    """(the pipeline, its recommended call)."""
    from diffusers import StableDiffusionXLPipeline

    run, family = model.settings.run, model.family
    parts = family.pipe  # type: ignore[attr-defined]
    supervised = run.method == "sft"
    scheduler = many_step_scheduler(model) if supervised else student_scheduler(model)
    unet: Any = merge_adapters(model.network)
    height, width = model.latent_shape[1:]
    if height == width:
        unet.register_to_config(sample_size=height)  # the size of a call that names none
    pipe = StableDiffusionXLPipeline(
        vae=family.vae, unet=unet, scheduler=scheduler,  # type: ignore[attr-defined]
        text_encoder=parts.text_encoder, text_encoder_2=parts.text_encoder_2,
        tokenizer=parts.tokenizer, tokenizer_2=parts.tokenizer_2,
        force_zeros_for_empty_prompt=parts.config.force_zeros_for_empty_prompt, add_watermarker=False,
    )  # fmt: skip
    height_px, width_px = model.settings.size_px
    recommended = {
        "num_inference_steps": run.teacher_num_steps if supervised else run.sample_num_steps,
        "guidance_scale": run.teacher_cfg if supervised else 0.0,
        "scheduler": type(scheduler).__name__,
        "height": height_px,
        "width": width_px,
    }
    return pipe, recommended


def write_folder(pipe: Any, recommended: dict[str, Any], out: Path) -> None:
    """The folder, complete or absent."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pipe.save_pretrained(temporary)
        text = json.dumps(recommended, indent=1) + "\n"
        (temporary / "recommended.json").write_text(text, encoding="utf-8")
        os.rename(temporary, out)  # noqa: PTH104 - refuses a folder that came meanwhile and has something in it
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error})", "make room, or choose another", EXIT_DISK
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is already there", "choose another folder, or remove it")


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(ExportConfig, "export", arguments)
    if config.to not in FORMATS:
        raise UserError(f"--to {config.to}: not available", f"available: {', '.join(FORMATS)}")
    if len(config.runs) != 1:
        raise UserError(f"{len(config.runs)} runs are given", "give the one run to export, OUTPUT_DIR/EXP_NAME")
    if config.out:
        refuse_existing(Path(config.out))
    import torch

    from train_t2i.student import load_student

    model = load_student(
        config.runs[0], config.step, pretrained_model=config.pretrained_model, vae=config.vae,
        device=torch.device("cpu"),
    )  # fmt: skip
    out = Path(config.out) if config.out else Path(str(model.run)) / "pipeline" / f"step-{model.step}"
    refuse_existing(out)
    pipe, recommended = build_pipeline(model)
    if config.dtype != "fp32":
        pipe.to({"fp16": torch.float16, "bf16": torch.bfloat16}[config.dtype])
    write_folder(pipe, recommended, out)
    steps, guidance = recommended["num_inference_steps"], recommended["guidance_scale"]
    print(f"{out}: pipe(prompt, num_inference_steps={steps}, guidance_scale={guidance:g})")
    return EXIT_DONE
