"""Whose images are scored: a run's student or the teacher, a diffusers pipeline folder, or a folder of images.

Shapes: images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from train_t2i.choice import ModelChoice, chosen
from train_t2i.errors import UserError
from train_t2i.families import Source
from train_t2i.image_layouts import IMAGE_LAYOUTS, METADATA, Asked, Entry, asked_images, entries_of, read_list
from train_t2i.pictures import exact_image, image_size
from train_t2i.sizes import Size
from train_t2i.student import ImageModel, default_device, number_format
from train_t2i.tables import prompt_of, records, short

INDEX, RECOMMENDED, CODE = "model_index.json", "recommended.json", "pipeline.py"  # of a pipeline folder
NOT_OURS = {"prompt", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt"}


@dataclass(frozen=True)
class Questions:
    """What every candidate is asked, as the flags of the verb say it."""

    prompts: str
    count: int
    layout: str
    samples: int  # images a prompt
    seed: int


class Candidate(Protocol):
    name: str
    size_px: Size
    makes: bool  # or its images are there already
    told: dict[str, Any]  # what a row says of it: step, run; resolution and model

    @property
    def network_calls(self) -> int | float | None:
        """An image, guided calls counted twice; known once images are made."""
        ...

    def entries(self, questions: Questions) -> tuple[list[Entry], list[list[Source]]]:
        """The prompts, and what each edits where it edits."""
        ...

    def images(self, asked: Sequence[Asked], sources: Sequence[Sequence[Source]]) -> Tensor: ...

    def seeds(self, asked: Sequence[Asked]) -> list[int] | None:
        """What each image was made with; None where nobody wrote it down."""
        ...


@dataclass
class OfModel:
    """The student of a run, or the teacher."""

    model: ImageModel
    makes: bool = True

    def __post_init__(self) -> None:
        run = self.model.settings.run
        self.name, self.size_px = self.model.name, self.model.settings.size_px
        self.told = {"step": self.model.step, "run": self.model.run, "resolution": run.resolution}
        self.told["model"] = run.pretrained_model

    @property
    def network_calls(self) -> int:
        return self.model.num_network_calls

    def entries(self, questions: Questions) -> tuple[list[Entry], list[list[Source]]]:
        return entries_of(self.model.settings, questions.prompts, questions.count, questions.layout)

    def images(self, asked: Sequence[Asked], sources: Sequence[Sequence[Source]]) -> Tensor:
        return self.model.images([each.prompt for each in asked], [each.seed for each in asked], sources)

    def seeds(self, asked: Sequence[Asked]) -> list[int]:
        return [each.seed for each in asked]


# -- a pipeline folder -----------------------------------------------------------------------------------------------


@dataclass
class OfPipeline:
    """Stock diffusers, called as ``recommended.json`` says.  The first noise is that of our own sampler for a seed."""

    folder: Path
    pipe: Any
    call: dict[str, Any]
    makes: bool = True
    rows_called: int = 0  # of the denoiser's batches
    made: int = 0

    def __post_init__(self) -> None:
        self.name, self.size_px = self.folder.name, (self.call["height"], self.call["width"])
        self.told = {"step": None, "run": str(self.folder), "model": str(self.folder)}
        self.told["resolution"] = f"{self.call['width']}x{self.call['height']}"
        denoiser = self.pipe.components.get("transformer") or self.pipe.components["unet"]
        denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, given: tuple, named: dict[str, Any]) -> None:
        self.rows_called += len(next(value for value in (*given, *named.values()) if torch.is_tensor(value)))

    @property
    def network_calls(self) -> int | float:
        calls = self.rows_called / self.made
        return int(calls) if calls.is_integer() else calls

    def entries(self, questions: Questions) -> tuple[list[Entry], list[list[Source]]]:
        return IMAGE_LAYOUTS[questions.layout].read(questions.prompts, questions.count), []

    @torch.no_grad()
    def images(self, asked: Sequence[Asked], sources: Sequence[Sequence[Source]]) -> Tensor:
        generators = [torch.Generator("cpu").manual_seed(each.seed) for each in asked]
        images = self.pipe(
            prompt=[each.prompt for each in asked], generator=generators, output_type="pt", **self.call
        ).images
        self.made += len(asked)
        return images

    def seeds(self, asked: Sequence[Asked]) -> list[int]:
        return [each.seed for each in asked]


def read_call(folder: Path) -> dict[str, Any]:
    """The call of a pipeline folder.  Raises UserError."""
    if (folder / CODE).is_file():
        raise UserError(f"{folder}: is sampled with code of its own, which is not run", "evaluate its run instead")
    path, way_out = (
        folder / RECOMMENDED,
        '{"num_inference_steps": 4, "guidance_scale": 0.0, "height": 1024, "width": 1024}',
    )
    try:
        call = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f"write it, e.g. {way_out}; a teacher is --teacher --pretrained-model {folder}"
        raise UserError(f"{path}: no such file, so nothing says how the pipeline is called", hint) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", f"e.g. {way_out}") from None
    if not isinstance(call, dict) or not all(isinstance(call.get(side), int) for side in ("height", "width")):
        raise UserError(f"{path}: not a call with height and width", f"e.g. {way_out}")
    if taken := sorted(NOT_OURS & call.keys()):
        raise UserError(f"{path}: {', '.join(taken)} is what an evaluation gives itself", "leave it out")
    return call


def load_pipeline(folder: Path, call: dict[str, Any], mixed_precision: str) -> OfPipeline:
    """Raises UserError where diffusers cannot load it from its files alone, or where it edits images."""
    from diffusers import DiffusionPipeline

    device = default_device()
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=number_format(mixed_precision, device)[0], local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder}: diffusers cannot load it ({short(str(error))})", "export it again") from None
    accepted = inspect.signature(pipe.__call__).parameters
    if "image" in accepted:
        raise UserError(f"{folder}: {type(pipe).__name__} edits images", "evaluate its run instead")
    if unknown := sorted(call.keys() - accepted.keys()):
        raise UserError(f"{folder / RECOMMENDED}: {type(pipe).__name__} takes no {', '.join(unknown)}", "leave it out")
    pipe.set_progress_bar_config(disable=True)
    return OfPipeline(folder, pipe.to(device), call)


# -- a folder of images ----------------------------------------------------------------------------------------------


@dataclass
class OfFolder:
    """Images that are there already, one file each, all of one size."""

    folder: Path
    files: dict[tuple[int, int], Path]  # (row of the prompt, sample) -> file
    size_px: Size
    listed: dict[tuple[int, int], int] = field(default_factory=dict)  # the same -> its seed
    makes: bool = False
    network_calls: None = None

    def __post_init__(self) -> None:
        height, width = self.size_px
        self.name = self.folder.name
        self.told = {"step": None, "run": str(self.folder), "resolution": f"{width}x{height}", "model": None}

    def entries(self, questions: Questions) -> tuple[list[Entry], list[list[Source]]]:
        return IMAGE_LAYOUTS[questions.layout].read(questions.prompts, questions.count), []

    def images(self, asked: Sequence[Asked], sources: Sequence[Sequence[Source]]) -> Tensor:
        paths = [self.files[each.row, each.sample] for each in asked]
        return torch.stack([exact_image(path, str(self.folder), *self.size_px) for path in paths])

    def seeds(self, asked: Sequence[Asked]) -> list[int] | None:
        return [self.listed[each.row, each.sample] for each in asked] if self.listed else None


def find_images(root: Path, questions: Questions) -> OfFolder:
    """Every image that is asked for, looked for before anything loads.  Raises UserError for the first that is missing,
    of another prompt or of another size: none is left out of a mean."""
    layout = IMAGE_LAYOUTS[questions.layout]
    entries, folder, listed = layout.read(questions.prompts, questions.count), layout.folder(root), read_list(root)
    files: dict[tuple[int, int], Path] = {}
    seeds: dict[tuple[int, int], int] = {}
    size_px: Size | None = None
    for each in asked_images(entries, questions.samples, questions.seed):
        names, place = layout.names(entries[each.row].place, each.sample), (each.row, each.sample)
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            others = f" (nor {', '.join(names[1:])})"
            raise UserError(
                f"{folder / names[0]}: no such image{others} of prompt {each.row + 1}: {short(each.prompt)}",
                f"--layout {questions.layout} says where images lie; every prompt needs its own",
            )
        if listed:
            seeds[place] = _listed_seed(root, path, listed, each)
        if questions.layout == "geneval" and each.sample == 0:
            _check_metadata(folder / entries[each.row].place / METADATA, each)
        size = image_size(path, str(root))
        if size != (size_px := size_px or size):
            raise UserError(
                f"{path}: {size[1]}x{size[0]} px, the first is {size_px[1]}x{size_px[0]}", "make all of one size"
            )
        files[place] = path
    if size_px is None:
        raise UserError(f"--prompts {questions.prompts}: no prompt", "give a file that has some")
    return OfFolder(root, files, size_px, seeds)


def _listed_seed(root: Path, path: Path, listed: dict[str, tuple[str, int]], asked: Asked) -> int:
    prompt, seed = listed.get(path.relative_to(root).as_posix(), (None, 0))
    if prompt != asked.prompt:
        raise UserError(
            f"{path}: made for {short(repr(prompt))}, not for prompt {asked.row + 1}: {short(asked.prompt)}",
            "give the --prompts and --layout that the folder was sampled with",
        )
    return seed


def _check_metadata(path: Path, asked: Asked) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file", "GenEval's folders say beside the images what was asked for")
    number, record = next(records(path, ()), (1, {}))
    if prompt_of(record, path, number) != asked.prompt:
        raise UserError(
            f"{path}: of another prompt than {short(asked.prompt)}", "give the --prompts that it was made with"
        )


# -- what was given --------------------------------------------------------------------------------------------------


def candidates(choice: ModelChoice, questions: Questions) -> list[Callable[[], Candidate]]:
    """One loader a candidate: the teacher, then runs, pipelines and folders in the order given; all are looked at before
    any is loaded.  Raises UserError."""
    loaders: list[Callable[[], Candidate]] = []
    if choice.teacher:
        (teacher,) = chosen(dataclasses.replace(choice, runs=()))
        loaders.append(lambda: OfModel(teacher()))
    for given in choice.runs:
        loaders.append(_candidate(given, choice, questions))
    if not loaders:
        raise UserError(
            "no model to work on", "give runs, pipelines or image folders, or --teacher with --pretrained-model"
        )
    return loaders


def _candidate(given: str, choice: ModelChoice, questions: Questions) -> Callable[[], Candidate]:
    folder = Path(given)
    if (folder / INDEX).is_file():
        call = read_call(folder)
        return lambda: load_pipeline(folder, call, choice.mixed_precision)
    if folder.is_dir() and not (folder / "checkpoints").is_dir():
        found = find_images(folder, questions)
        return lambda: found
    (student,) = chosen(dataclasses.replace(choice, runs=(given,), teacher=False))
    return lambda: OfModel(student())
