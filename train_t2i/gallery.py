"""``python -m train_t2i gallery RUN``: one HTML file to look at, prompt by prompt: teacher | student at each step, scores.

The file is static and needs nothing else: images are embedded (WebP, scaled down so that the page stays small).  By
default it shows the sample sheets that the run left.  With ``--prompts FILE`` it makes images from the run's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError

if TYPE_CHECKING:
    from train_t2i.families.base import Source
    from train_t2i.gallery_images import Column
    from train_t2i.pages.gallery import Picture
    from train_t2i.scorers import Scorers

PAGE_PIXELS = 80e6  # of all images of a page
WIDTHS_PX = (512, 384, 320, 256, 192, 160, 128, 96)


@dataclass(frozen=True)
class GalleryConfig:
    """Write one HTML file with a run's images, prompt by prompt: the teacher beside the student at each step."""

    runs: tuple[str, ...] = flag((), "run folder, OUTPUT_DIR/EXP_NAME (may stand without the flag)")
    out: str | None = flag(None, "file to write (default: RUN/gallery.html)")
    title: str | None = flag(None, "heading of the page (default: the run's name)")
    max_steps: int = flag(8, "steps shown, evenly over all; the first and the last always", low=1)
    rewards: str = flag("", "rewards to score each image with, comma list of NAME=PATH: weights file or tower folder")
    scorer: str | None = flag(None, "a score of your own, module:function, as of evaluate")
    prompts: str | None = flag(
        None,
        "prompts, of an edit model a table of edits: images are made from the run's checkpoints, the teacher's too",
    )
    count: int | None = flag(None, "prompts of that file, from the first (default: 500)", low=1)
    pretrained_model: str | None = flag(None, "with --prompts: where the run's base model lies now, if it has moved")


def check_config(config: GalleryConfig) -> None:
    """Mistakes that can be seen before anything is loaded."""
    if len(config.runs) != 1:
        raise UserError(f"{len(config.runs)} runs are given", "give the one run to show, OUTPUT_DIR/EXP_NAME")
    for name in ("count", "pretrained_model"):
        if getattr(config, name) is not None and config.prompts is None:
            raise UserError(f"--{name.replace('_', '-')} without --prompts does nothing", "leave it out")
    if config.out and Path(config.out).is_dir():
        raise UserError(f"--out {config.out}: is a folder", "name the file to write, such as gallery.html")


def width_for(num_images: int) -> int:
    """The width in px that images are scaled down to, so that all of them are ``PAGE_PIXELS`` at most where they can."""
    fits = (width for width in WIDTHS_PX if num_images * width * width <= PAGE_PIXELS)
    return next(fits, WIDTHS_PX[-1])


def pictures(column: Column, width_px: int, scorers: Scorers | None) -> Iterator[Picture]:
    """What the page shows of each of a column's images, scored in batches."""
    from train_t2i.gallery_images import BATCH
    from train_t2i.pages.gallery import Picture
    from train_t2i.pages.parts import webp

    images, first = iter(column.images()), 0
    while batch := list(islice(images, BATCH)):
        rows = slice(first, first := first + len(batch))
        prompts = [prompt for prompt, _ in column.keys[rows]]
        scores = scored(scorers, batch, prompts, column.sources[rows]) if scorers else [{} for _ in batch]
        for image, found in zip(batch, scores, strict=True):
            yield Picture(webp(image, width_px), image.size, found)


def scored(
    scorers: Scorers, images: Sequence, prompts: Sequence[str], sources: Sequence[Sequence[Source]]
) -> list[dict[str, float]]:
    """Score name -> number, of each image; an edit beside what it starts from."""
    import numpy as np
    import torch

    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    found = scorers.scores(pixels.to(scorers.device).float() / 255, prompts, sources)
    return [{name: float(values[i]) for name, values in found.items()} for i in range(len(images))]


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(GalleryConfig, "gallery", arguments)
    check_config(config)
    from train_t2i.config import EDIT_FAMILIES
    from train_t2i.report_data import read_run

    run = read_run(config.runs[0])
    if config.scorer and not config.prompts and run.settings.get("model_family") in EDIT_FAMILIES:
        raise UserError(
            "--scorer: a sheet holds what its edits start from in another size alone",
            "give --prompts, a table of edits",
        )
    from tqdm import tqdm

    from train_t2i.gallery_images import of_checkpoints, of_samples
    from train_t2i.pages.gallery import page
    from train_t2i.storage import write_atomically

    scorers = scorers_of(config)
    if config.prompts:
        columns = of_checkpoints(
            config.runs[0], config.prompts, config.count or 500, config.max_steps, config.pretrained_model
        )
    else:
        columns = of_samples(run, config.max_steps)
    total = sum(len(column.keys) for column in columns)
    with tqdm(total=total, unit="image", desc=run.name) as bar:
        shown: list[list[Picture]] = []
        for column in columns:
            shown.append([])
            for picture in pictures(column, width_for(total), scorers):
                shown[-1].append(picture)
                bar.update()
    out = Path(config.out) if config.out else run.root / "gallery.html"
    try:
        write_atomically(out, page(config.title or run.name, run, columns, shown))
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror or error}", "choose another file, or make room", EXIT_DISK
        ) from None
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return EXIT_DONE


def scorers_of(config: GalleryConfig) -> Scorers | None:
    """What images are scored with, as ``evaluate`` does; None where nothing was asked for."""
    if not (config.rewards or config.scorer):
        return None
    from train_t2i.evaluate import EvaluateConfig
    from train_t2i.scorers import Scorers

    return Scorers(EvaluateConfig(rewards=config.rewards, scorer=config.scorer))
