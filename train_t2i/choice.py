"""Which model a verb works on: a run's student at a step, or the teacher.  Flags shared by sample, evaluate and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train_t2i.config import FAMILY_NAMES, Config, flag, parse_resolution
from train_t2i.errors import UserError

if TYPE_CHECKING:
    from train_t2i.student import ImageModel

IMAGE_LAYOUT_NAMES = ("plain", "hpsv2", "geneval")
LIST = "prompts.jsonl"  # of a folder that sample wrote: a line an image with file, prompt and seed


@dataclass(frozen=True)
class RunChoice:
    """A run and a step of it."""

    runs: tuple[str, ...] = flag((), "run folder, OUTPUT_DIR/EXP_NAME (may stand without the flag)")
    step: str = flag("latest", "step of the run: a number, or latest")


@dataclass(frozen=True)
class ModelChoice(RunChoice):
    """A run and a step of it, or the teacher."""

    teacher: bool = flag(False, "the teacher, sampled in many guided steps")
    pretrained_model: str | None = flag(None, "the teacher's model; for a run: where its base model lies now")
    vae: str | None = flag(None, "VAE to use instead of the model's own (folder or hub id)")
    teacher_num_steps: int = flag(25, "steps of the teacher", low=1, high=1000)
    teacher_cfg: float = flag(7.0, "guidance of the teacher; 1: none", low=1)
    resolution: str = flag("1024", "image size of the teacher in pixels: N or WIDTHxHEIGHT (a run knows its own)")
    mixed_precision: str = flag("fp16", "number format of the teacher's network calls", choices=("no", "fp16", "bf16"))
    text_length: int = flag(
        0, "tokens of the teacher's longest text; 0: its pipeline's own (a run knows its own)", low=0
    )
    model_family: str = flag(
        "auto", "architecture of the teacher; auto reads model_index.json", choices=("auto", *FAMILY_NAMES)
    )
    source_size: int = flag(1024, "as of train, of an edit teacher's sources (a run knows its own)", low=32)
    source_seen_size: int = flag(384, "likewise", low=32)
    guidance_embed: float = flag(3.5, "what a guidance-distilled teacher (FLUX.1-dev) is told", low=0)


def chosen(choice: ModelChoice) -> list[Callable[[], ImageModel]]:
    """One loader a model, teacher first; every run's folder is looked at before any model is loaded."""
    from train_t2i.student import find_record, load_student, load_teacher

    loaders: list[Callable[[], ImageModel]] = []
    if choice.teacher:
        run = teacher_config(choice)
        loaders.append(lambda: load_teacher(run, choice.teacher_num_steps, choice.teacher_cfg))
    for folder in choice.runs:
        find_record(folder, choice.step)
        loaders.append(
            lambda folder=folder: load_student(  # type: ignore[misc]
                folder, choice.step, pretrained_model=choice.pretrained_model, vae=choice.vae
            )
        )
    if not loaders:
        raise UserError("no model to work on", "give run folders, or --teacher with --pretrained-model")
    return loaders


def only(choice: ModelChoice) -> Callable[[], ImageModel]:
    """The loader of the one model that was chosen."""
    loaders = chosen(choice)
    if len(loaders) > 1:
        raise UserError(f"{len(loaders)} models are given", "give one run, or --teacher")
    return loaders[0]


def teacher_config(choice: ModelChoice) -> Config:
    parse_resolution(choice.resolution)
    return Config(
        pretrained_model=choice.pretrained_model or Config().pretrained_model,
        vae=choice.vae,
        resolution=choice.resolution,
        mixed_precision=choice.mixed_precision,
        text_length=choice.text_length,
        guidance_embed=choice.guidance_embed,
        model_family=choice.model_family,
        source_size=choice.source_size,
        source_seen_size=choice.source_seen_size,
    )
