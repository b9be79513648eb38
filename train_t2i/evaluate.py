"""``python -m train_t2i evaluate A [B ...] --prompts FILE``: score models on the same prompts, and compare them in pairs.

A, B are runs, diffusers pipeline folders or folders of images.  What is written, where it is asked for:

    TABLE.json                  a row a model: its scores, distances, time, and what they rest on (``--out``)
    TABLE.paired.json           each model's scores a prompt; every pair's differences with their intervals
    TABLE.md                    both, to read
    FOLDER/index.html           the models side by side, and a blind vote between two (``--side-by-side``)

A row: model, network_calls, adherence, clip, hps, held_out, frechet, recall, ms_per_image (null where it was not asked
for), precision, kid, diversity, the rewards that have no column of their own, and what they rest on: count,
samples_per_prompt, seed, ci, step, run, scorers.  A model that is evaluated again replaces its row.  Images are scored as
they are saved, in 8 bits.  Distances, recall, precision and diversity are taken in the image features of the held-out
tower, which no loss ever saw, against the images of ``--reference``.

    python -m train_t2i evaluate runs/dmdr --name dmdr-1 --prompts eval.txt --scorer shapes.oracle:adherence --out table.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.choice import IMAGE_LAYOUT_NAMES, ModelChoice
from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DONE, UserError
from train_t2i.evaluation.table import format_table, markdown, merge_row, read_table, write_text
from train_t2i.reward_flags import reward_paths

if TYPE_CHECKING:
    from train_t2i.evaluation.candidates import Candidate, Questions
    from train_t2i.evaluation.paired import Scored
    from train_t2i.evaluation.side_by_side import SideBySide
    from train_t2i.scorers import Scorers


@dataclass(frozen=True)
class EvaluateConfig(ModelChoice):
    """Score runs, pipeline folders, folders of images or the teacher on prompts, and compare them prompt by prompt."""

    prompts: str = flag("", "file of prompts; of edit models: image table with source_file_path and text")
    count: int = flag(500, "prompts to use, from the first (hpsv2: of each style)", low=2)
    samples_per_prompt: int = flag(1, "images of each prompt; two or more give the diversity", low=1)
    layout: str = flag(
        "plain", "how --prompts is read, and where the images of a folder lie", choices=IMAGE_LAYOUT_NAMES
    )
    seed: int = flag(1000, "image i is made with seed + i", low=0, high=2**62)
    batch_size: int = flag(50, "images a batch", low=1)
    name: str | None = flag(None, "names of the models in the table, comma list (default: RUN@STEP, teacher or FOLDER)")
    scorer: str | None = flag(
        None,
        "adherence, module:function, (images (B,3,H,W) in [0,1], prompts) -> (B,); of edit models with the sources as third",
    )
    rewards: str = flag("", "rewards to score with, comma list of NAME=PATH: weights file or tower folder")
    clip_reward_model: str | None = flag(None, "the same as --rewards clip=PATH")
    hpsv2_reward_model: str | None = flag(None, "the same as --rewards hpsv2=PATH")
    magic_prompt: str = flag("", "words put before the prompt for HPS; none here, 'Realistic photo' in training")
    held_out_model: str | None = flag(None, "CLIP tower that was in no loss: its score, distances, recall, diversity")
    inception: str | None = flag(
        None, "Inception-v3 weights file of torch-fidelity: fid and kid_inception as papers take them"
    )
    reference: str | None = flag(
        None, "real images for distances, precision and recall: a folder, or a table (columns image, prompt)"
    )
    reference_count: int = flag(0, "images of the reference to use, from the first; 0: all", low=0)
    out: str | None = flag(None, "JSON table to write, or to add the rows to; TABLE.paired.json and TABLE.md beside it")
    save_images: str | None = flag(None, "folder for a grid of each model's images")
    side_by_side: str | None = flag(None, "folder for a page with the models side by side and a blind vote")
    side_by_side_count: int = flag(100, "prompts on that page, evenly over all", low=1)

    def questions(self) -> Questions:
        from train_t2i.evaluation.candidates import Questions

        return Questions(self.prompts, self.count, self.layout, self.samples_per_prompt, self.seed)


def check_config(config: EvaluateConfig) -> None:
    """Mistakes that can be seen before anything is loaded."""
    if not config.prompts:
        raise UserError("--prompts: no file given", "give the file of prompts to evaluate on")
    models = len(config.runs) + config.teacher
    names = config.name.split(",") if config.name else []
    if names and not len(names) == len({*names} - {""}) == models:
        raise UserError(
            f"--name {config.name}: {models} models are given",
            "give as many different names, separated by commas, or leave it out",
        )
    folders = [Path(given).resolve().name for given in config.runs if Path(given).is_dir()]
    if not names and (same := sorted({name for name in folders if folders.count(name) > 1})):
        raise UserError(f"two of the models are called {same[0]}", "give --name, a name for each")
    if config.reference and not (config.held_out_model or config.inception):
        raise UserError("--reference needs the features of a tower", "give --held-out-model, or --inception")
    if config.inception and not config.reference:
        raise UserError("--inception without --reference does nothing", "give --reference")
    if config.reference_count and not config.reference:
        raise UserError("--reference-count without --reference does nothing", "give --reference")
    hps = config.hpsv2_reward_model or "hpsv2" in reward_paths("--rewards", config.rewards)
    if config.magic_prompt and not hps:
        raise UserError("--magic-prompt without --hpsv2-reward-model does nothing", "give the reward, or leave it out")
    if config.out:
        read_table(config.out)
        check_writable(f"--out {config.out}", Path(config.out).parent)
    for option, folder in (("--save-images", config.save_images), ("--side-by-side", config.side_by_side)):
        if folder:
            check_writable(f"{option} {folder}", Path(folder))


def check_writable(given: str, folder: Path) -> None:
    """Make the folder and try it: the first row or grid comes only after a whole model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{given}: cannot be written ({error.strerror})", "choose another folder") from None


def evaluate_model(
    load: Callable[[], Candidate], name: str | None, scorers: Scorers, config: EvaluateConfig, page: SideBySide | None
) -> tuple[dict[str, Any], Scored]:
    """A row of the table, and the scores a prompt; both are in their files when this returns."""
    from train_t2i.evaluation import measure
    from train_t2i.image_layouts import asked_images

    model = load()
    name = name or model.name
    entries, sources = model.entries(config.questions())
    asked = asked_images(entries, config.samples_per_prompt, config.seed)
    scorers.features.prepare(model.size_px)
    keep = page.keep(name, len(entries), sources) if page else None
    made = measure.make_and_score(model, asked, scorers, config.batch_size, name, sources, keep)
    row, scored = measure.measured(model, name, made, asked, scorers, config.batch_size, sources)
    if config.out:
        write_row(config.out, row, scored)
    if config.save_images:
        measure.save_grid(config.save_images, name, made.shown)
    return row, scored


def write_row(out: str, row: dict[str, Any], scored: Scored) -> None:
    """The table, the pairs and the page of both, with a model's row in its place."""
    from train_t2i.evaluation.paired import merge_scored

    rows = merge_row(out, row)
    found = merge_scored(out, scored, [each["model"] for each in rows])
    write_text(str(Path(out).with_suffix(".md")), markdown(rows, found))


def check_prompts(config: EvaluateConfig) -> None:
    """Enough prompts for what is asked of them; fewer than ``--count`` are told."""
    from train_t2i.image_layouts import IMAGE_LAYOUTS, check_samples
    from train_t2i.metrics import LEAST_ROWS

    check_samples(config.layout, config.samples_per_prompt)
    found = len(IMAGE_LAYOUTS[config.layout].read(config.prompts, config.count))
    if config.reference and found < LEAST_ROWS:
        raise UserError(f"{config.prompts}: {found} prompts", f"--reference needs {LEAST_ROWS} at least")
    if found < config.count:
        print(f"{config.prompts} holds {found} prompts: all of them are used")


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(EvaluateConfig, "evaluate", arguments)
    check_config(config)
    from train_t2i.evaluation.candidates import candidates
    from train_t2i.evaluation.paired import format_pairs, pairs, read_scored
    from train_t2i.evaluation.side_by_side import SideBySide
    from train_t2i.scorers import Scorers

    check_prompts(config)
    if config.out:
        read_scored(config.out)
    loaders = candidates(config, config.questions())
    side_by_side = config.side_by_side and SideBySide(Path(config.side_by_side), config.side_by_side_count, config.seed)
    page = side_by_side or None
    scorers = Scorers(config)
    names = config.name.split(",") if config.name else [None] * len(loaders)
    found = [evaluate_model(load, name, scorers, config, page) for load, name in zip(loaders, names, strict=True)]
    rows = [row for row, _ in found]
    print(format_table(rows))
    if told := format_pairs(pairs([scored for _, scored in found])):
        print(told)
    for row in rows:  # where --reward-margin should lie above
        told = ", ".join(f"{key} {row['p99'][key]:.4g}" for key in row["rewards"])
        if told:
            print(f"99th percentiles of {row['model']}: {told}")
    if page:
        print(page.write(" and ".join(page.models)))
    return EXIT_DONE
