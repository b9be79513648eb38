"""``python -m train_t2i evaluate RUN...``: score models on prompts and write one row a model into a JSON table.

A row: model, network_calls, adherence, clip, hps, held_out, frechet, recall, ms_per_image (null where it was not asked
for), and what they rest on: precision, count, seed, ci, step, run, scorers.  A model that is evaluated again replaces
its row.  Images are scored as they are saved, in 8 bits.  Frechet distance, recall and precision are taken in the
image features of the held-out tower, which no loss ever saw, against the images of ``--reference``.

    python -m train_t2i evaluate runs/dmdr --name dmdr-1 --prompts eval.txt --scorer shapes.oracle:adherence --out table.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.choice import ModelChoice, chosen
from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from train_t2i.families import Source
    from train_t2i.scorers import Scorers
    from train_t2i.student import ImageModel

COLUMNS = ("model", "network_calls", "adherence", "clip", "hps", "held_out", "frechet", "recall", "ms_per_image")
MAX_GRID = 64  # images of a saved grid


@dataclass(frozen=True)
class EvaluateConfig(ModelChoice):
    """Score runs, or the teacher, on prompts: adherence, rewards, Frechet distance, recall, time an image."""

    prompts: str = flag("", "file of prompts; of edit models: image table with source_file_path and text")
    count: int = flag(500, "prompts to use, from the first", low=2)
    seed: int = flag(1000, "image i is made with seed + i", low=0, high=2**62)
    batch_size: int = flag(50, "images a batch", low=1)
    name: str | None = flag(None, "names of the models in the table, comma list (default: RUN@STEP, or teacher)")
    scorer: str | None = flag(
        None,
        "adherence, module:function, (images (B,3,H,W) in [0,1], prompts) -> (B,); of edit models with the sources as third",
    )
    clip_reward_model: str | None = flag(None, "CLIP reward: weights file or tower folder")
    hpsv2_reward_model: str | None = flag(None, "HPSv2.1 reward: weights file or tower folder")
    magic_prompt: str = flag("", "words put before the prompt for HPS; none here, 'Realistic photo' in training")
    held_out_model: str | None = flag(None, "CLIP tower that was in no loss: its score, Frechet distance and recall")
    reference: str | None = flag(None, "table of real images (columns image, prompt) for Frechet distance and recall")
    reference_count: int = flag(0, "rows of the reference to use, from the first; 0: all", low=0)
    out: str | None = flag(None, "JSON table to write, or to add the rows to")
    save_images: str | None = flag(None, "folder for a grid of each model's images")


@dataclass
class Made:
    """What is kept of the images of one model."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)  # score name -> (B,) a batch
    features: list[Tensor] = field(default_factory=list)  # (B, D) a batch
    shown: list[Tensor] = field(default_factory=list)  # (3, H, W), the first of them
    count: int = 0
    seconds_per_image: list[float] = field(default_factory=list)  # one a batch


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
    if config.reference and not config.held_out_model:
        raise UserError("--reference needs the features of a tower", "give --held-out-model")
    if config.reference_count and not config.reference:
        raise UserError("--reference-count without --reference does nothing", "give --reference")
    if config.magic_prompt and not config.hpsv2_reward_model:
        raise UserError("--magic-prompt without --hpsv2-reward-model does nothing", "give the reward, or leave it out")
    if config.out:
        read_table(config.out)
        check_writable(f"--out {config.out}", Path(config.out).parent)
    if config.save_images:
        check_writable(f"--save-images {config.save_images}", Path(config.save_images))


def check_writable(given: str, folder: Path) -> None:
    """Make the folder and try it: the first row or grid comes only after a whole model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{given}: cannot be written ({error.strerror})", "choose another folder") from None


# -- the table -------------------------------------------------------------------------------------------------------


def read_table(path: str, option: str = "--out") -> list[dict[str, Any]]:
    """The rows of a table; none where there is no file yet."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be read ({error})", "give a table, or a new file") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "model" in row for row in rows):
        raise UserError(f"{option} {path}: not a table of models", "give a table, or a new file")
    return rows


def merge_row(path: str, row: Mapping[str, Any]) -> None:
    """Put a row into the table in its model's place, or at the end; the file is whole at any instant."""
    from train_t2i.storage import write_atomically

    rows = read_table(path)
    places = [i for i, old in enumerate(rows) if old["model"] == row["model"]]
    if places:
        rows[places[0]] = dict(row)
    else:
        rows.append(dict(row))
    try:
        write_atomically(Path(path), json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})", "choose another file") from None


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain text, a line a model, columns aligned."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(COLUMNS), *([cell(row.get(name)) for name in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    pad = [str.ljust, *[str.rjust] * (len(COLUMNS) - 1)]
    return "\n".join("  ".join(p(text, w) for p, text, w in zip(pad, line, widths)).rstrip() for line in lines)


# -- one model -------------------------------------------------------------------------------------------------------


def as_saved(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], fp32, rounded to the 8 bits of a PNG."""
    return (images.detach().float().clamp(0, 1) * 255).round() / 255


def timed_images(
    model: ImageModel, prompts: Sequence[str], seeds: Sequence[int], sources: Sequence[Sequence[Source]]
) -> tuple[Tensor, float]:
    """Images and seconds an image: text encoding, network and decoder."""
    import torch

    started = time.perf_counter()
    images = model.images(prompts, seeds, sources)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return images, (time.perf_counter() - started) / len(prompts)


def make_and_score(
    model: ImageModel,
    prompts: Sequence[str],
    scorers: Scorers,
    config: EvaluateConfig,
    label: str,
    sources: Sequence[Sequence[Source]] = (),
) -> Made:
    """All images of one model, batch by batch; only scores, features and the first few images are kept.

    The first batch warms up.  Times are those of the whole batches after it; with no other batch, it is made twice.
    """
    from tqdm import tqdm

    made = Made()
    size = min(config.batch_size, len(prompts))
    warm_again = len(prompts) < 2 * size
    with tqdm(total=len(prompts), unit="image", desc=label) as bar:
        for first in range(0, len(prompts), size):
            batch = list(prompts[first : first + size])
            seeds, edited = [config.seed + first + i for i in range(len(batch))], sources[first : first + size]
            if first == 0 and warm_again:
                timed_images(model, batch, seeds, edited)
            images, seconds = timed_images(model, batch, seeds, edited)
            if len(batch) == size and (first > 0 or warm_again):
                made.seconds_per_image.append(seconds)
            pictures = as_saved(images)
            for name, scores in scorers.scores(pictures, batch, edited).items():
                made.values.setdefault(name, []).append(scores)
            if scorers.held_out is not None:
                made.features.append(scorers.features(pictures))
            made.shown.extend(pictures[: max(0, MAX_GRID - len(made.shown))].cpu())
            made.count += len(batch)
            bar.update(len(batch))
    return made


def row_of(model: ImageModel, name: str, made: Made, scorers: Scorers, config: EvaluateConfig) -> dict:
    """Means, intervals and distances of one model: a row of the table."""
    import torch

    from train_t2i import metrics

    values = {key: torch.cat(batches) for key, batches in made.values.items()}
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"model": name, "network_calls": model.num_network_calls}
    row |= {key: float(scores.double().mean()) for key, scores in values.items()}
    row["ms_per_image"] = 1000 * statistics.median(made.seconds_per_image)
    row["precision"] = None
    if scorers.reference is not None:
        features = torch.cat(made.features)
        row["frechet"] = metrics.frechet(features, scorers.reference)
        row["recall"] = metrics.recall(features, scorers.reference)
        row["precision"] = metrics.precision(features, scorers.reference)
    settings = model.settings.run
    return row | {
        "count": made.count,
        "seed": config.seed,
        "p99": {key: float(scores.double().quantile(0.99)) for key, scores in values.items()},
        "ci": {key: list(metrics.bootstrap_ci(scores, seed=config.seed)) for key, scores in values.items()},
        "step": model.step,
        "run": model.run,
        "scorers": scorers.told
        | {"batch_size": config.batch_size, "resolution": settings.resolution, "model": settings.pretrained_model},
    }


def save_grid(folder: str, name: str, images: Sequence[Tensor]) -> None:
    from train_t2i.sample import square_grid

    path = Path(folder) / f"{''.join(c if c.isalnum() or c in '-_.@' else '_' for c in name)}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        square_grid(images).save(path)
    except OSError as error:
        raise UserError(f"--save-images {folder}: cannot be written ({error})", "choose another folder") from None


def evaluate_model(load: Callable[[], ImageModel], name: str | None, scorers: Scorers, config: EvaluateConfig) -> dict:
    from train_t2i.feed import asked_of

    model = load()
    name = name or model.name
    prompts, sources = asked_of(model.settings, config.prompts, config.count)
    scorers.prepare_reference(model.settings.size_px)
    made = make_and_score(model, prompts, scorers, config, name, sources)
    row = row_of(model, name, made, scorers, config)
    if config.out:
        merge_row(config.out, row)
    if config.save_images:
        save_grid(config.save_images, name, made.shown)
    return row


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(EvaluateConfig, "evaluate", arguments)
    check_config(config)
    from train_t2i.prompts import load_prompts
    from train_t2i.scorers import MIN_ROWS, Scorers

    loaders = chosen(config)
    prompts = load_prompts(config.prompts)[: config.count]
    if config.reference and len(prompts) < MIN_ROWS:
        raise UserError(f"{config.prompts}: {len(prompts)} prompts", f"--reference needs {MIN_ROWS} at least")
    if len(prompts) < config.count:
        print(f"{config.prompts} holds {len(prompts)} prompts: all of them are used")
    scorers = Scorers(config)
    names = config.name.split(",") if config.name else [None] * len(loaders)
    rows = [evaluate_model(load, name, scorers, config) for load, name in zip(loaders, names, strict=True)]
    print(format_table(rows))
    for row in rows:  # where --reward-margin should lie above
        told = ", ".join(f"{key} {value:.4g}" for key, value in row["p99"].items() if key in ("clip", "hps"))
        if told:
            print(f"99th percentiles of {row['model']}: {told}")
    return EXIT_DONE
