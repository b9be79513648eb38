"""What is measured of one candidate: scores, features, times; and the row that says it.

Shapes: images (B, 3, H, W) in [0, 1]; B images a batch, S images a prompt, P prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train_t2i import metrics
from train_t2i.errors import UserError
from train_t2i.evaluation.candidates import Candidate
from train_t2i.evaluation.features import distances
from train_t2i.evaluation.paired import Scored, by_prompt, digest
from train_t2i.evaluation.table import COLUMNS
from train_t2i.families import Source
from train_t2i.image_layouts import Asked
from train_t2i.scorers import Scorers

MAX_GRID = 64  # images of a saved grid
Keep = Callable[[Asked, Tensor], None]  # (what was asked, its image (3, H, W) as saved)


@dataclass
class Made:
    """What is kept of the images of one model."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)  # score name -> (B,) a batch
    features: dict[str, list[Tensor]] = field(default_factory=dict)  # space -> (B, D) a batch
    shown: list[Tensor] = field(default_factory=list)  # (3, H, W), the first of them
    seconds_per_image: list[float] = field(default_factory=list)  # one a batch


def as_saved(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], fp32, rounded to the 8 bits of a PNG."""
    return (images.detach().float().clamp(0, 1) * 255).round() / 255


def timed_images(model: Candidate, asked: Sequence[Asked], sources: Sequence[Sequence[Source]]) -> tuple[Tensor, float]:
    """Images and seconds an image: text encoding, network and decoder."""
    started = time.perf_counter()
    images = model.images(asked, sources)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return images, (time.perf_counter() - started) / len(asked)


def make_and_score(
    model: Candidate,
    asked: Sequence[Asked],
    scorers: Scorers,
    batch_size: int,
    label: str,
    sources: Sequence[Sequence[Source]] = (),
    keep: Keep | None = None,
) -> Made:
    """All images of one model, batch by batch; only scores, features and the first few images are kept.

    The first batch warms up.  Times are those of the whole batches after it; with no other batch, it is made twice.
    ``sources`` are those of each prompt, or none.
    """
    made = Made()
    size = min(batch_size, len(asked))
    warm_again = model.makes and len(asked) < 2 * size
    with tqdm(total=len(asked), unit="image", desc=label) as bar:
        for first in range(0, len(asked), size):
            batch = asked[first : first + size]
            edited = [sources[each.row] for each in batch] if sources else []
            if first == 0 and warm_again:
                timed_images(model, batch, edited)
            images, seconds = timed_images(model, batch, edited)
            if model.makes and len(batch) == size and (first > 0 or warm_again):
                made.seconds_per_image.append(seconds)
            pictures = as_saved(images)
            for name, scores in scorers.scores(pictures, [each.prompt for each in batch], edited).items():
                made.values.setdefault(name, []).append(scores)
            for space, features in scorers.features.of(pictures).items():
                made.features.setdefault(space, []).append(features)
            made.shown.extend(pictures[: max(0, MAX_GRID - len(made.shown))].cpu())
            for each, picture in zip(batch, pictures, strict=True):
                if keep is not None:
                    keep(each, picture)
            bar.update(len(batch))
    return made


def measured(
    model: Candidate,
    name: str,
    made: Made,
    asked: Sequence[Asked],
    scorers: Scorers,
    batch_size: int,
    sources: Sequence[Sequence[Source]] = (),
) -> tuple[dict[str, Any], Scored]:
    """Means, intervals and distances of one model: a row of the table, and the scores of each prompt."""
    prompts = 1 + max(each.row for each in asked)
    images = {key: torch.cat(batches) for key, batches in made.values.items()}
    values = {key: by_prompt(scores, prompts) for key, scores in images.items()}
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | dict.fromkeys(("precision", "kid", "diversity"))
    row |= {"model": name, "network_calls": model.network_calls}
    if made.seconds_per_image:
        row["ms_per_image"] = 1000 * statistics.median(made.seconds_per_image)
    for space, reference in scorers.features.references.items():
        row |= distances(space, torch.cat(made.features[space]), reference)
    if "held_out" in made.features and len(asked) > prompts:
        values["diversity"] = metrics.spread(torch.cat(made.features["held_out"]).unflatten(0, (-1, prompts)))
    row |= {key: float(scores.double().mean()) for key, scores in values.items()}
    row |= {
        "count": prompts,
        "samples_per_prompt": len(asked) // prompts,
        "seed": asked[0].seed,
        "rewards": list(scorers.rewards),
        "p99": {key: float(scores.double().quantile(0.99)) for key, scores in images.items()},
        "ci": {key: list(metrics.bootstrap_ci(scores, seed=asked[0].seed)) for key, scores in values.items()},
        "step": model.told["step"],
        "run": model.told["run"],
        "scorers": scorers.told
        | {"batch_size": batch_size, "resolution": model.told["resolution"], "model": model.told["model"]},
    }
    seeds, edits = model.seeds(asked), [source.pixels.numpy().tobytes() for each in sources for source in each]
    return row, Scored(
        name,
        digest([*(each.prompt for each in asked), *edits]),
        None if seeds is None else digest(seeds),
        {key: scorers.identity(key) for key in values},
        {key: scores.tolist() for key, scores in values.items()},
    )


def save_grid(folder: str, name: str, images: Sequence[Tensor]) -> None:
    from train_t2i.sample import square_grid

    path = Path(folder) / f"{''.join(c if c.isalnum() or c in '-_.@' else '_' for c in name)}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        square_grid(images).save(path)
    except OSError as error:
        raise UserError(f"--save-images {folder}: cannot be written ({error})", "choose another folder") from None
