"""``python -m train_t2i sample RUN``: images from a run, a step of it, or the teacher.

OUT/00000.png ...    image i, made with seed SEED + i: a function of its prompt and seed, whatever the batch size
OUT/grid.png         the first of them side by side
OUT/prompts.jsonl    a line an image: file, prompt, seed, model
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train_t2i.choice import ModelChoice, only
from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from train_t2i.config import Settings
    from train_t2i.families import Source
    from train_t2i.student import ImageModel

LIST = "prompts.jsonl"
MAX_GRID = 64  # images of a grid


@dataclass(frozen=True)
class SampleConfig(ModelChoice):
    """Make images with a run's student at a step, or with the teacher."""

    prompts: str | None = flag(None, "file of prompts; of an edit model: image table with source_file_path and text")
    sources: tuple[str, ...] = flag((), "image that --prompt edits; may be repeated")
    prompt: str | None = flag(None, "one prompt instead of a file; --count images of it")
    count: int = flag(8, "images in all: the first prompts of the file, or seeds of the one prompt", low=1)
    seed: int = flag(0, "image i is made with seed + i", low=0, high=2**62)
    batch_size: int = flag(8, "images a batch", low=1)
    out: str = flag("samples", "folder to write")


def check_asked(config: SampleConfig) -> None:
    """Mistakes that can be seen before anything is loaded."""
    if (config.prompts is None) == (config.prompt is None):
        raise UserError("what to sample: give --prompts FILE or --prompt TEXT", "one of them")
    if config.sources and config.prompt is None:
        raise UserError("--source goes with --prompt", "a table of --prompts names its own sources")
    if config.prompts is not None:
        from train_t2i.prompts import load_prompts

        load_prompts(config.prompts)


def asked(config: SampleConfig, settings: Settings) -> tuple[list[str], list[list[Source]]]:
    """One prompt an image, and what each edits."""
    from train_t2i.feed import asked_of, sources_at

    if config.prompt is None:
        prompts, sources = asked_of(settings, str(config.prompts), config.count)
        if len(prompts) < config.count:
            print(f"{config.prompts} holds {len(prompts)} prompts: all of them are used")
        return prompts, sources
    told = sources_at(settings, config.sources)
    return [config.prompt] * config.count, [told] * config.count if told else []


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

    from train_t2i.log import to_pil

    prompts, sources = asked(config, model.settings)

    shown: list[Tensor] = []
    lines: list[dict[str, object]] = []
    with tqdm(total=len(prompts), unit="image", desc=model.name) as bar:
        for first in range(0, len(prompts), config.batch_size):
            batch = prompts[first : first + config.batch_size]
            seeds = [config.seed + first + i for i in range(len(batch))]
            edited = sources[first : first + config.batch_size]
            for i, image in enumerate(model.images(batch, seeds, edited).cpu(), first):
                name = f"{i:05d}.png"
                to_pil(image).save(folder / name)
                lines.append({"file": name, "prompt": prompts[i], "seed": config.seed + i, "model": model.name})
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
