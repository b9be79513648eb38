"""``python -m train_t2i sample RUN``: images from a run, a step of it, or the teacher.

OUT/00000.png ...    image i, made with seed SEED + i: a function of its prompt and seed, whatever the batch size
OUT/grid.png         the first of them side by side
OUT/prompts.jsonl    a line an image: file, prompt, seed, model

``--layout hpsv2`` and ``geneval`` read those benchmarks' prompts and put the images where their scorers look for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train_t2i.choice import IMAGE_LAYOUT_NAMES, LIST, ModelChoice, only
from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from train_t2i.config import Settings
    from train_t2i.families import Source
    from train_t2i.image_layouts import Asked, Entry
    from train_t2i.student import ImageModel

MAX_GRID = 64  # images of a grid


@dataclass(frozen=True)
class SampleConfig(ModelChoice):
    """Make images with a run's student at a step, or with the teacher."""

    prompts: str | None = flag(None, "file of prompts; of an edit model: image table with source_file_path and text")
    sources: tuple[str, ...] = flag((), "image that --prompt edits; may be repeated")
    prompt: str | None = flag(None, "one prompt instead of a file; --count images of it")
    count: int = flag(
        8,
        "the first prompts of the file (hpsv2: of each style), or images of the one prompt, each with its seed",
        low=1,
    )
    layout: str = flag(
        "plain",
        "how --prompts is read and the images are laid: for HPSv2's or GenEval's own scorer",
        choices=IMAGE_LAYOUT_NAMES,
    )
    samples_per_prompt: int = flag(1, "images of each prompt of the file", low=1)
    seed: int = flag(0, "image i is made with seed + i", low=0, high=2**62)
    batch_size: int = flag(8, "images a batch", low=1)
    out: str = flag("samples", "folder to write")


def check_asked(config: SampleConfig) -> None:
    """Mistakes that can be seen before anything is loaded."""
    if (config.prompts is None) == (config.prompt is None):
        raise UserError("what to sample: give --prompts FILE or --prompt TEXT", "one of them")
    if config.sources and config.prompt is None:
        raise UserError("--source goes with --prompt", "a table of --prompts names its own sources")
    if config.prompt is not None and (config.layout != "plain" or config.samples_per_prompt > 1):
        raise UserError("--layout and --samples-per-prompt go with --prompts", "--count says how many of --prompt")
    if config.prompts is not None:
        from train_t2i.image_layouts import IMAGE_LAYOUTS, check_samples

        check_samples(config.layout, config.samples_per_prompt)
        IMAGE_LAYOUTS[config.layout].read(config.prompts, config.count)


def asked(config: SampleConfig, settings: Settings) -> tuple[list[Entry], list[Asked], list[list[Source]]]:
    """The prompts, the images that are asked for, and what each of those edits."""
    from train_t2i.feed import sources_at
    from train_t2i.image_layouts import Entry, asked_images, entries_of

    if config.prompt is None:
        entries, sources = entries_of(settings, str(config.prompts), config.count, config.layout)
        if config.layout == "plain" and len(entries) < config.count:
            print(f"{config.prompts} holds {len(entries)} prompts: all of them are used")
        return (
            entries,
            asked_images(entries, config.samples_per_prompt, config.seed),
            sources * config.samples_per_prompt,
        )
    told = sources_at(settings, config.sources)
    entries = [Entry(config.prompt, f"{i:05d}") for i in range(config.count)]
    return entries, asked_images(entries, 1, config.seed), [told] * config.count if told else []


def square_grid(images: Sequence[Tensor]) -> Image.Image:
    """(3, H, W) images, read row by row, in about as many columns as rows."""
    import torch

    from train_t2i.log import grid_image

    columns = max(1, round(len(images) ** 0.5))
    return grid_image([torch.stack(list(images[i : i + columns])) for i in range(0, len(images), columns)])


def open_folder(out: str) -> Path:
    folder = Path(out)
    if (folder / LIST).exists():
        raise UserError(f"--out {out}: already holds samples", "choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror})", "choose another folder") from None
    return folder


def write_samples(model: ImageModel, config: SampleConfig, folder: Path) -> None:
    """The images, then the grid, then the list: where that is, the folder is complete."""
    from tqdm import tqdm

    from train_t2i.image_layouts import IMAGE_LAYOUTS
    from train_t2i.log import to_pil

    layout = IMAGE_LAYOUTS[config.layout]
    entries, wanted, sources = asked(config, model.settings)

    shown: list[Tensor] = []
    lines: list[dict[str, object]] = []
    with tqdm(total=len(wanted), unit="image", desc=model.name) as bar:
        for first in range(0, len(wanted), config.batch_size):
            batch = wanted[first : first + config.batch_size]
            edited = sources[first : first + config.batch_size]
            images = model.images([each.prompt for each in batch], [each.seed for each in batch], edited).cpu()
            for each, image in zip(batch, images, strict=True):
                name = layout.write(folder, entries[each.row], each.sample, to_pil(image))
                lines.append({"file": name, "prompt": each.prompt, "seed": each.seed, "model": model.name})
                if len(shown) < MAX_GRID:
                    shown.append(image)
            bar.update(len(batch))
    square_grid(shown).save(folder / "grid.png")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / LIST).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(SampleConfig, "sample", arguments)
    check_asked(config)
    load = only(config)
    folder = open_folder(config.out)
    try:
        write_samples(load(), config, folder)
    except OSError as error:
        raise UserError(
            f"--out {config.out}: cannot be written ({error.strerror})", "make room and run it again", EXIT_DISK
        ) from None
    print(folder)
    return EXIT_DONE
