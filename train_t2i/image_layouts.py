"""Prompt sets, and where the images of their prompts lie.

plain    any file of prompts             00000.png; of more images a prompt also 00000-1.png, 00000-2.png ...
hpsv2    a folder of STYLE.json          STYLE/00000.jpg: what ``hpsv2.evaluate`` reads (tgxs002/HPSv2, hpsv2/evaluation.py)
geneval  evaluation_metadata.jsonl       00000/metadata.jsonl and 00000/samples/0000.png ... (djghosh13/geneval, README.md)

HPSv2's scorer takes every name in its folder for a style, so ours, which has a list and a grid beside the images, keeps
them in ``images/``; and it leaves out an image that is not there, where we stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i.choice import LIST
from train_t2i.config import EDIT_FAMILIES
from train_t2i.errors import UserError
from train_t2i.prompts import load_prompts
from train_t2i.tables import place_of, prompt_of, records

if TYPE_CHECKING:
    from PIL import Image

    from train_t2i.config import Settings
    from train_t2i.families import Source

STYLES = ("anime", "concept-art", "paintings", "photo")  # of the HPSv2 benchmark
METADATA = "metadata.jsonl"
JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}  # Pillow's own 75 is a choice that a score would see


@dataclass(frozen=True)
class Entry:
    """A prompt of a set."""

    prompt: str
    place: str  # what the names of its images begin with
    metadata: str = ""  # GenEval's, as JSON


@dataclass(frozen=True)
class Asked:
    """An image that is asked for: image ``sample`` of prompt ``row``."""

    row: int
    sample: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class ImageLayout:
    read: Callable[[str, int], list[Entry]]  # (source, count) -> the prompts
    names: Callable[[str, int], tuple[str, ...]]  # (place, sample) -> where the image may lie; the first is written
    samples: int  # the most images of a prompt; 0: any
    inside: str = ""  # where the images lie in a folder of ours

    def folder(self, root: Path) -> Path:
        """Where the images of ``root`` lie: a folder of ours, or one that another program wrote."""
        return root / self.inside if (root / self.inside).is_dir() else root

    def write(self, root: Path, entry: Entry, sample: int, image: Image.Image) -> str:
        """Save an image into a folder of ours; its name there."""
        name = f"{self.inside}/{self.names(entry.place, sample)[0]}".lstrip("/")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.metadata:
            (root / self.inside / entry.place / METADATA).write_text(entry.metadata + "\n", encoding="utf-8")
        image.save(path, **(JPEG if path.suffix == ".jpg" else {}))
        return name


def asked_images(entries: Sequence[Entry], samples: int, seed: int) -> list[Asked]:
    """The first image of every prompt, then the second of every prompt, ...; image n is made with ``seed`` + n."""
    rows = range(len(entries))
    return [Asked(i, k, entries[i].prompt, seed + k * len(entries) + i) for k in range(samples) for i in rows]


def check_samples(layout: str, samples: int) -> None:
    most = IMAGE_LAYOUTS[layout].samples
    if most and samples > most:
        raise UserError(f"--samples-per-prompt {samples}: --layout {layout} has {most} image a prompt", "leave it out")


def read_plain(source: str, count: int) -> list[Entry]:
    return [Entry(prompt, f"{i:05d}") for i, prompt in enumerate(load_prompts(source)[:count])]


def read_hpsv2(source: str, count: int) -> list[Entry]:
    """The first ``count`` prompts of every style."""
    folder = Path(source)
    styles = [style for style in STYLES if (folder / f"{style}.json").is_file()]
    if not styles:
        named = ", ".join(f"{style}.json" for style in STYLES)
        raise UserError(f"--prompts {source}: --layout hpsv2 takes a folder with {named}", "name the folder")
    entries = []
    for style in styles:
        path = folder / f"{style}.json"
        prompts = [_told(path, number, record) for number, record in records(path, ("prompt",))]
        entries += [Entry(prompt, f"{style}/{i:05d}") for i, prompt in enumerate(prompts[:count])]
    return entries


def read_geneval(source: str, count: int) -> list[Entry]:
    path = Path(source)
    if path.suffix != ".jsonl":
        raise UserError(f"--prompts {source}: --layout geneval takes evaluation_metadata.jsonl", "name the file")
    entries: list[Entry] = []
    for number, record in records(path, ()):
        if "tag" not in record:
            raise UserError(f"{place_of(path, number)}: no tag", "GenEval's metadata has tag, include and prompt")
        entries.append(Entry(_told(path, number, record), f"{len(entries):05d}", json.dumps(record)))
    return entries[:count]


def _told(path: Path, number: int, record: dict) -> str:
    """A prompt that is there: images are numbered by their prompts, so that none can be left out."""
    if not (prompt := prompt_of(record, path, number)):
        raise UserError(f"{place_of(path, number)}: a blank prompt", "images are numbered by prompts: fill it in")
    return prompt


def plain_names(place: str, sample: int) -> tuple[str, ...]:
    stem = f"{place}-{sample}" if sample else place
    return tuple(f"{stem}.{kind}" for kind in ("png", "jpg", "jpeg", "webp"))


def hpsv2_names(place: str, sample: int) -> tuple[str, ...]:
    return f"{place}.jpg", f"{place}.png"


def geneval_names(place: str, sample: int) -> tuple[str, ...]:
    """Its README numbers with four digits, its own program for diffusers with five."""
    return f"{place}/samples/{sample:04d}.png", f"{place}/samples/{sample:05d}.png"


IMAGE_LAYOUTS = {
    "plain": ImageLayout(read_plain, plain_names, 0),
    "hpsv2": ImageLayout(read_hpsv2, hpsv2_names, 1, "images"),
    "geneval": ImageLayout(read_geneval, geneval_names, 0),
}


def entries_of(settings: Settings, source: str, count: int, layout: str) -> tuple[list[Entry], list[list[Source]]]:
    """The prompts of a set, and what each edits where the model edits: then the set is an image table."""
    if settings.run.model_family not in EDIT_FAMILIES:
        return IMAGE_LAYOUTS[layout].read(source, count), []
    if layout != "plain":
        raise UserError(
            f"--layout {layout}: {settings.run.model_family} edits images, which it has none of", "leave it out"
        )
    from train_t2i.feed import asked_of

    prompts, sources = asked_of(settings, source, count)
    return [Entry(prompt, f"{i:05d}") for i, prompt in enumerate(prompts)], sources


def read_list(root: Path) -> dict[str, tuple[str, int]]:
    """File -> (prompt, seed) of a folder that sample wrote; nothing of another's.  Raises UserError."""
    path, found = root / LIST, {}
    if not path.is_file():
        return {}
    for number, record in records(path, ()):
        try:
            found[str(record["file"])] = str(record["prompt"]), int(record["seed"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}:{number}: no file, prompt and seed", "sample the folder anew") from None
    return found
