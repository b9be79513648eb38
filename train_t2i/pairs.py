"""``python -m train_t2i pairs``: (noise, prompt, teacher latent) pairs, the data of ``--method ode``.

    OUT/metadata.csv              image,prompt,seed,rand_device,num_inference_steps,cfg_scale,height,width
    OUT/latents-00000.safetensors latents (n, C, H, W) fp32: the rows of metadata.csv in order, ``shard_size`` a file
    OUT/images/00000000.png       with --images

The noise of a row is ``torch.Generator("cpu").manual_seed(seed)``'s and is not stored.  A stopped run goes on with the
same command: finished shards stay.  OUT/pairs.json ties them to the settings and to a digest of the prompts.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from train_t2i import storage
from train_t2i.cli import parse_verb
from train_t2i.config import Config, flag
from train_t2i.data import Order
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError
from train_t2i.log import to_pil
from train_t2i.prompts import load_prompts
from train_t2i.student import ImageModel, load_teacher
from train_t2i.tables import place_of, records, short

COLUMNS = ("image", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale", "height", "width")
SETTINGS = "pairs.json"
DIGEST = "prompts_digest"  # among them; folders of older versions have none: they train, but cannot be gone on with


@dataclass(frozen=True)
class PairsConfig:
    """Render prompts with the teacher and keep (noise seed, prompt, final latent)."""

    out: str = flag("pairs", "folder to write")
    pretrained_model: str = flag("stabilityai/stable-diffusion-xl-base-1.0", "teacher")
    vae: str | None = flag(None, "VAE to use instead of the model's own")
    data_path_train: str = flag("t2i-2m-filtered-prompts.txt", "prompts")
    count: int = flag(10_000, "pairs in all", low=1)
    num_inference_steps: int = flag(25, "teacher steps", low=1, high=1000)
    cfg_scale: float = flag(7.0, "teacher guidance; 1: none", low=1)
    resolution: str = flag("1024", "image size in pixels: N or WIDTHxHEIGHT")
    batch_size: int = flag(8, "rows a batch", low=1)
    shard_size: int = flag(256, "rows a file", low=1)
    mixed_precision: str = flag("fp16", "number format of the network calls", choices=("no", "fp16", "bf16"))
    text_length: int = flag(0, "tokens of the longest text; 0: the pipeline's own", low=0)
    guidance_embed: float = flag(3.5, "what a guidance-distilled teacher (FLUX.1-dev) is told", low=0)
    seed: int = flag(30, "seed of the order of prompts and of the first row", low=0, high=2**62)
    images: bool = flag(False, "write the decoded images too")


@dataclass(frozen=True)
class Pair:
    prompt: str
    seed: int
    latent: Tensor  # (C, H, W) fp32


class PairStore:
    """Reads a pairs folder; latents are mapped, not loaded."""

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        settings, rows = self.folder / SETTINGS, self.folder / "metadata.csv"
        if not settings.is_file() or not rows.is_file():
            raise UserError(
                f"--data-path-train {path}: not a pairs folder", "make one: python -m train_t2i pairs --out DIR"
            )
        size = read_settings(settings).get("shard_size")
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{settings}: shard_size is {size!r}", "make the pairs in another --out")
        self.shard_size: int = size
        self.rows = read_rows(rows)
        self.latent_shape: tuple[int, int, int] = tuple(self[0].latent.shape)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Pair:
        prompt, seed = self.rows[row]
        shard, position = divmod(row, self.shard_size)
        path = shard_path(self.folder, shard)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                latent = file.get_slice("latents")[position]
        except (OSError, safetensors.SafetensorError, IndexError) as error:
            raise UserError(f"{path}: cannot be read ({error})", "delete it and run the pairs command again") from None
        return Pair(prompt, seed, latent)


def read_settings(path: Path) -> dict[str, Any]:
    """What a pairs folder was begun with.  Raises UserError."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "make the pairs in another --out") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not the settings of a pairs folder", "make the pairs in another --out")
    return settings


def read_rows(path: Path) -> list[tuple[str, int]]:
    """(prompt, seed) of every row of metadata.csv.  Raises UserError."""
    rows = []
    for number, record in records(path, COLUMNS):
        if missing := [name for name in ("prompt", "seed") if name not in record]:
            raise UserError(f"{path}: no column {missing[0]}", f"the pairs command writes {', '.join(COLUMNS)}")
        seed = record["seed"].strip()
        if not seed.isdecimal() or int(seed) >= 2**63:
            raise UserError(f"{place_of(path, number)}: seed is {short(repr(seed))}", "write the number of its noise")
        rows.append((record["prompt"], int(seed)))
    if not rows:
        raise UserError(f"{path}: no row", "run the pairs command again")
    return rows


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def batches(rows: range, size: int) -> Iterator[range]:
    for first in range(rows.start, rows.stop, size):
        yield range(first, min(first + size, rows.stop))


def write_shard(config: PairsConfig, model: ImageModel, prompts: Sequence[str], rows: range, bar: tqdm) -> None:
    """One file of latents, complete or absent."""
    folder = Path(config.out)
    latents = []
    for batch in batches(rows, config.batch_size):
        made = model.latents([prompts[row] for row in batch], [config.seed + row for row in batch])
        latents.append(made.cpu())
        if config.images:
            for row, image in zip(batch, model.family.decode(made), strict=True):
                to_pil(image).save(folder / "images" / f"{row:08d}.png")
        bar.update(len(batch))
    path = shard_path(folder, rows.start // config.shard_size)
    temporary = path.with_suffix(".tmp")
    storage.write_tensors(temporary, {"latents": torch.cat(latents)})
    storage.rename(temporary, path)


def write_metadata(config: PairsConfig, prompts: Sequence[str], size_px: tuple[int, int]) -> None:
    height, width = size_px
    path = Path(config.out) / "metadata.csv"
    with open(path.with_suffix(".tmp"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row, prompt in enumerate(prompts):
            image = f"images/{row:08d}.png" if config.images else ""
            told = (
                image,
                prompt,
                config.seed + row,
                "cpu",
                config.num_inference_steps,
                config.cfg_scale,
                height,
                width,
            )
            writer.writerow(told)
    os.replace(path.with_suffix(".tmp"), path)


def digest_of(prompts: Sequence[str]) -> str:
    """The same for the same prompts in the same order, whatever file they came from."""
    return hashlib.blake2b("\n".join(prompts).encode(), digest_size=16).hexdigest()


def open_folder(config: PairsConfig, prompts: Sequence[str]) -> None:
    """Make the folder, or check that what is in it was begun with the same settings and prompts."""
    folder = Path(config.out)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "batch_size")}
    path = folder / SETTINGS
    try:
        (folder / "images" if config.images else folder).mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            storage.write_json(temporary, settings | {DIGEST: digest_of(prompts)})
            storage.rename(temporary, path)
            return
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})", "choose another folder") from None
    then = read_settings(path)
    if changed := [key for key in settings if then.get(key) != settings[key]]:
        told = "; ".join(f"{key}: then {then.get(key)!r}, now {settings[key]!r}" for key in changed)
        raise UserError(f"--out {folder}: begun with other settings ({told})", "choose another --out")
    if then.get(DIGEST) != digest_of(prompts):
        was = "with other prompts than it has now" if DIGEST in then else "before its prompts were noted"
        raise UserError(f"--out {folder}: begun from {config.data_path_train} {was}", "choose another --out")


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(PairsConfig, "pairs", arguments)
    run = Config(
        pretrained_model=config.pretrained_model, vae=config.vae, resolution=config.resolution,
        mixed_precision=config.mixed_precision, text_length=config.text_length, guidance_embed=config.guidance_embed,
    )  # fmt: skip
    lines = load_prompts(config.data_path_train)
    order = Order(len(lines), config.seed)
    prompts = [lines[order.index_at(row)] for row in range(config.count)]
    open_folder(config, prompts)
    model = load_teacher(run, config.num_inference_steps, config.cfg_scale)
    shards = list(batches(range(config.count), config.shard_size))
    try:
        with tqdm(total=config.count, unit="pair", desc="pairs") as bar:
            for shard, rows in enumerate(shards):
                if shard_path(Path(config.out), shard).exists():
                    bar.update(len(rows))
                else:
                    write_shard(config, model, prompts, rows, bar)
        write_metadata(config, prompts, model.settings.size_px)
    except OSError as error:
        raise UserError(
            f"--out {config.out}: cannot be written ({error.strerror})", "make room and run the same command", EXIT_DISK
        ) from None
    return EXIT_DONE
