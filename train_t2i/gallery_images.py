"""Columns of a gallery: the teacher's images and the student's at each step, of the same prompts and noise.

They come from the sample sheets that a run left, or are made anew from its checkpoints for a file of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.choice import ModelChoice, teacher_config
from train_t2i.errors import UserError
from train_t2i.log import GAP_PX, to_pil
from train_t2i.report_data import RunStory, Sheet, draws_teacher, opened, thin

if TYPE_CHECKING:
    from PIL import Image

    from train_t2i.families.base import Source
    from train_t2i.image_layouts import Entry
    from train_t2i.student import ImageModel

Key = tuple[str, int]  # a prompt, and its how-manieth of that text
SEED = 1000  # image i of a made column is that of seed SEED + i, as in evaluate
BATCH = 8


@dataclass(frozen=True)
class Column:
    """``images`` yields one RGB image a key, in order; it reads or makes them as it is asked.  ``sources``: what each edits."""

    step: int | None  # None: the teacher
    keys: tuple[Key, ...]
    images: Callable[[], Iterator[Image.Image]]
    sources: Sequence[Sequence[Source]] = ()

    @property
    def name(self) -> str:
        return "teacher" if self.step is None else f"step {self.step}"


def keys_of(prompts: Sequence[str]) -> tuple[Key, ...]:
    """Prompts that stand twice are told apart, in order."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, 0) + 1
        keys.append((prompt, seen[prompt] - 1))
    return tuple(keys)


# -- what the run left -----------------------------------------------------------------------------------------------


def student_files(sheet: Sheet) -> list[Path]:
    return [sheet.grid.with_name(f"student_{i:03d}.png") for i in range(len(sheet.prompts))]


def of_samples(run: RunStory, most_steps: int) -> list[Column]:
    """The sheets of a run, the teacher's images first where its method has a teacher.  Raises UserError."""
    whole = [sheet for sheet in run.sheets if sheet.prompts and all(file.is_file() for file in student_files(sheet))]
    if not whole:
        raise UserError(
            f"{run.root}: no sample sheets in samples/", "give --prompts FILE: images are made from its checkpoints"
        )
    shown = thin(whole, most_steps)
    columns = [
        Column(sheet.step, keys_of(sheet.prompts), lambda sheet=sheet: map(opened, student_files(sheet)))  # type: ignore[misc]
        for sheet in shown
    ]
    return [teacher_of(shown), *columns] if draws_teacher(run.settings) else columns


def teacher_of(sheets: Sequence[Sheet]) -> Column:
    """Of each prompt the teacher's image on the newest sheet that has it."""
    places = {key: (sheet, i) for sheet in sheets for i, key in enumerate(keys_of(sheet.prompts))}
    newest_first = [key for sheet in reversed(sheets) for key in keys_of(sheet.prompts)]
    keys = tuple(dict.fromkeys(newest_first))

    def images() -> Iterator[Image.Image]:
        rows: dict[int, list[Image.Image]] = {}
        for key in keys:
            sheet, place = places[key]
            if sheet.step not in rows:
                rows[sheet.step] = last_row(opened(sheet.grid), opened(student_files(sheet)[0]).size)
            if place >= len(rows[sheet.step]):
                raise UserError(f"{sheet.grid}: has fewer images than prompts", "remove its folder")
            yield rows[sheet.step][place]

    return Column(None, keys, images)


def last_row(grid: Image.Image, size: tuple[int, int]) -> list[Image.Image]:
    """The images of the lowest row of a sheet, each (width, height) = ``size``."""
    width, height = size
    top = grid.height - height - GAP_PX
    lefts = range(GAP_PX, grid.width - width, width + GAP_PX)
    return [grid.crop((left, top, left + width, top + height)) for left in lefts]


# -- made anew -------------------------------------------------------------------------------------------------------


def of_checkpoints(
    run: str, prompts: str, count: int, most_steps: int, pretrained_model: str | None = None
) -> list[Column]:
    """The teacher, and the student at each checkpoint of a run, all on the first prompts of a file.  Raises UserError."""
    from train_t2i.checkpoint import RunFolder
    from train_t2i.student import find_record, load_student, load_teacher

    find_record(run, "latest")
    steps = thin(sorted(RunFolder(Path(run)).steps()), most_steps)
    entries: list[Entry] = []
    sources: list[Any] = []

    def student(step: int) -> ImageModel:
        return load_student(run, str(step), pretrained_model=pretrained_model)

    def made(load: Callable[[], ImageModel]) -> Iterator[Image.Image]:
        model = load()
        for first in range(0, len(entries), BATCH):
            rows = slice(first, min(first + BATCH, len(entries)))
            asked = [entry.prompt for entry in entries[rows]]
            seeds = [SEED + i for i in range(rows.start, rows.stop)]
            yield from map(to_pil, model.images(asked, seeds, sources[rows] if sources else ()))

    from train_t2i.image_layouts import entries_of

    settings = student(steps[-1]).settings
    entries, sources = entries_of(settings, prompts, count, "plain")
    keys = keys_of([entry.prompt for entry in entries])

    def teacher() -> ImageModel:
        run = settings.run
        same = ("pretrained_model", "vae", "resolution", "mixed_precision", "text_length", "model_family",
                "source_size", "source_seen_size", "guidance_embed")  # fmt: skip
        choice = ModelChoice(teacher=True, **{name: getattr(run, name) for name in same})
        return load_teacher(teacher_config(choice), run.teacher_num_steps, run.teacher_cfg)

    return [
        Column(None, keys, lambda: made(teacher), sources),
        *(Column(step, keys, lambda step=step: made(lambda: student(step)), sources) for step in steps),  # type: ignore[misc]
    ]
