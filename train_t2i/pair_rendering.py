"""What the pairs verb does with its flags: the files of this process's share, one by one, then the table."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train_t2i import build, storage
from train_t2i.config import Config, DirectConfig, Settings
from train_t2i.data import Order
from train_t2i.errors import UserError
from train_t2i.feed import dataset_for, sources_of
from train_t2i.image_data import Images, Rows
from train_t2i.log import to_pil
from train_t2i.pair_data import COLUMNS, SETTINGS, TABLE, read_settings, shard_path
from train_t2i.pairs import PairsConfig
from train_t2i.rows import SOURCES
from train_t2i.shares import Share, cannot_be_written, locked
from train_t2i.student import ImageModel, load_teacher
from train_t2i.text_key import denoiser_digest

TOLD = (*COLUMNS, "teacher_num_inference_steps", "teacher_cfg_scale", "model")
DIGEST = "prompts_digest"  # among the settings


def batches(rows: range, size: int) -> Iterator[range]:
    for first in range(rows.start, rows.stop, size):
        yield range(first, min(first + size, rows.stop))


@dataclass(frozen=True)
class Asked:
    """What the rows of the folder are made from: those of the data, in an order of the seed."""

    data: Rows
    rows: Sequence[int]  # of the data

    def prompt(self, row: int) -> str:
        return self.data.prompt(self.rows[row])

    def source_files(self, row: int) -> list[str]:
        data = self.data
        return [str(path.resolve()) for path in data.rows[self.rows[row]].sources] if isinstance(data, Images) else []

    def digest(self) -> str:
        """The same for the same prompts (and sources) in the same order, whatever file they came from."""
        lines = ("\t".join([self.prompt(row), *self.source_files(row)]) for row in range(len(self.rows)))
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def rendered(config: PairsConfig, model: ImageModel, asked: Asked, rows: range) -> dict[str, Tensor]:
    """Name of a tensor -> (n, ...) on the model's device, for the rows of a batch."""
    texts, seeds = [asked.prompt(row) for row in rows], [config.seed + row for row in rows]
    edits = isinstance(asked.data, Images)
    sources = sources_of(asked.data, [asked.rows[row] for row in rows]) if edits else []
    if not config.states:
        return {"latents": model.latents(texts, seeds, sources)}
    *states, latents = model.states(texts, seeds, model.family.path.grid(config.student_num_steps), sources)
    return {"latents": latents, "states": torch.stack(states, dim=1)}


def write_shard(config: PairsConfig, model: ImageModel, asked: Asked, rows: range, bar: tqdm) -> None:
    """One file of latents, complete or absent, after its images."""
    folder = Path(config.out)
    parts = []
    for batch in batches(rows, config.batch_size):
        made = rendered(config, model, asked, batch)
        if config.images:
            for row, image in zip(batch, model.family.decode(made["latents"]), strict=True):
                to_pil(image).save(folder / "images" / f"{row:08d}.png")
        parts.append({name: tensor.cpu() for name, tensor in made.items()})
        bar.update(len(batch))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if config.states:
        tensors["grid"] = model.family.path.grid(config.student_num_steps)
    path = shard_path(folder, rows.start // config.shard_size)
    temporary = path.with_suffix(".tmp")
    storage.write_tensors(temporary, tensors)
    storage.rename(temporary, path)


def write_metadata(config: PairsConfig, asked: Asked, model: ImageModel) -> None:
    """The table, once every file is there."""
    height, width = model.settings.size_px
    digest = denoiser_digest(config.pretrained_model, model.family.denoiser_name) or ""
    teacher = (config.num_inference_steps, config.cfg_scale, digest)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    edits = isinstance(asked.data, Images)
    writer.writerow((*TOLD, SOURCES) if edits else TOLD)
    for row in range(config.count):
        image = f"images/{row:08d}.png" if config.images else ""
        student = (config.seed + row, "cpu", config.student_num_steps, 1)
        sources = (json.dumps(asked.source_files(row)),) if edits else ()
        writer.writerow((image, asked.prompt(row), *student, height, width, *teacher, *sources))
    storage.write_atomically(Path(config.out) / TABLE, text.getvalue())


def open_folder(config: PairsConfig, asked: Asked) -> None:
    """Make the folder, or check that what is in it was begun with the same settings and prompts."""
    folder = Path(config.out)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "batch_size")}
    path = folder / SETTINGS
    (folder / "images" if config.images else folder).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        storage.write_atomically(path, json.dumps(settings | {DIGEST: asked.digest()}, indent=1) + "\n")
        return
    then = read_settings(path)
    if changed := [key for key in settings if then.get(key) != settings[key]]:
        told = "; ".join(f"{key}: then {then.get(key)!r}, now {settings[key]!r}" for key in changed)
        raise UserError(f"--out {folder}: begun with other settings ({told})", "choose another --out")
    if then.get(DIGEST) != asked.digest():
        raise UserError(
            f"--out {folder}: begun from {config.data_path_train} with other prompts than it has now",
            "choose another --out",
        )


def render_all(config: PairsConfig, run: Config, asked: Asked, share: Share) -> None:
    """This process's files, and the table by whoever finds them all."""
    folder = Path(config.out)
    shards = list(batches(range(config.count), config.shard_size))
    mine = {shard: rows for shard, rows in enumerate(shards) if share.takes(shard)}
    model = load_teacher(run, config.num_inference_steps, config.cfg_scale)
    with tqdm(total=sum(map(len, mine.values())), unit="pair", desc="pairs", disable=not share.is_main) as bar:
        for shard, rows in mine.items():
            if shard_path(folder, shard).exists():
                bar.update(len(rows))
            else:
                write_shard(config, model, asked, rows, bar)
    if all(shard_path(folder, shard).exists() for shard in range(len(shards))):
        write_metadata(config, asked, model)


def render(config: PairsConfig) -> None:
    """Make the folder that ``config`` asks for, or go on with it.  Raises UserError."""
    run = Config(
        pretrained_model=config.pretrained_model, vae=config.vae, resolution=config.resolution, shift=config.shift,
        mixed_precision=config.mixed_precision, text_length=config.text_length, guidance_embed=config.guidance_embed,
        model_family=config.model_family, source_size=config.source_size, source_seen_size=config.source_seen_size,
        data_path_train=config.data_path_train,
    )  # fmt: skip
    settings = build.resolved(Settings(replace(run, method="direct"), DirectConfig()))
    data = dataset_for("prompts", settings)
    order = Order(len(data), config.seed)
    asked = Asked(data, [order.index_at(row) for row in range(config.count)])
    share = Share.of_environment()
    try:
        with locked(Path(config.out), share):
            open_folder(config, asked)
            render_all(config, run, asked, share)
    except OSError as error:
        raise cannot_be_written(config.out, error) from None
