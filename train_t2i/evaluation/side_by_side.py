"""A page that shows models side by side, prompt by prompt, and lets a person vote blind between two of them.

FOLDER/index.html      static, offline: its own script and style, nothing loaded but the images beside it
FOLDER/images/         one PNG a prompt and model, numbered, not named; of edits also one a source

The side on which a model stands is drawn from the seed, each side half of the time.  The file that the page saves names
the models; ``python -m train_t2i votes FILE`` counts it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from train_t2i.errors import EXIT_DISK, UserError
from train_t2i.evaluation.measure import Keep
from train_t2i.families import Source
from train_t2i.image_layouts import Asked
from train_t2i.log import to_pil
from train_t2i.pages.parts import SMALL_PX, document, esc, in_script, text_of

HERE = Path(__file__).parent
SOURCE = "source"  # what the first column of a page of edits is called


@dataclass
class SideBySide:
    folder: Path
    count: int  # prompts shown, evenly over all
    seed: int
    models: list[str] = field(default_factory=list)
    prompts: dict[int, tuple[str, int]] = field(default_factory=dict)  # row -> (prompt, seed), of the first model
    sources: dict[int, int] = field(default_factory=dict)  # row -> how many, of the first model that edits
    width_px: int = 0

    def __post_init__(self) -> None:
        if (self.folder / "index.html").exists():
            raise UserError(f"--side-by-side {self.folder}: already holds a page", "choose another folder")

    def keep(self, model: str, prompts: int, sources: Sequence[Sequence[Source]] = ()) -> Keep:
        """What ``make_and_score`` hands each image of the next model to; ``sources`` are those of each prompt, or none."""
        shown = {i * prompts // min(self.count, prompts) for i in range(min(self.count, prompts))}
        number = len(self.models)
        self.models.append(model)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)

        def save(asked: Asked, image: Tensor) -> None:
            if asked.sample or asked.row not in shown:
                return
            self.prompts.setdefault(asked.row, (asked.prompt, asked.seed))
            self.width_px = max(self.width_px, image.shape[-1])
            self._save(self.image(asked.row, number), image)
            if sources and asked.row not in self.sources:
                for place, source in enumerate(sources[asked.row]):
                    self._save(self.source(asked.row, place), source.pixels / 255)
                self.sources[asked.row] = len(sources[asked.row])

        return save

    def _save(self, name: str, image: Tensor) -> None:
        try:
            to_pil(image).save(self.folder / name)
        except OSError as error:
            raise UserError(
                f"--side-by-side {self.folder}: cannot be written ({error.strerror})", "make room", EXIT_DISK
            ) from None

    @staticmethod
    def image(row: int, model: int) -> str:
        return f"images/{row:05d}-{model}.png"

    @staticmethod
    def source(row: int, place: int) -> str:
        return f"images/{row:05d}-source-{place}.png"

    def write(self, title: str) -> Path:
        """The page, once all models are through."""
        path = self.folder / "index.html"
        path.write_text(page(title, self.models, self.data(), self.width_px), encoding="utf-8")
        return path

    def data(self) -> dict[str, Any]:
        """What the page's script is given."""
        pairs = [f"{i}-{j}" for i, j in itertools.combinations(range(len(self.models)), 2)]
        sides = {pair: drawn_sides(len(self.prompts), f"{self.seed} {pair}") for pair in pairs}
        rows = [
            {
                "number": row,
                "prompt": prompt,
                "seed": seed,
                "sources": [self.source(row, number) for number in range(self.sources.get(row, 0))],
                "images": [self.image(row, model) for model in range(len(self.models))],
                "flipped": {pair: sides[pair][place] for pair in pairs},
            }
            for place, (row, (prompt, seed)) in enumerate(sorted(self.prompts.items()))
        ]
        told = {"models": self.models, "rows": rows}
        return {"sheet": self._digest(told), **told}

    def _digest(self, told: dict[str, Any]) -> str:
        """Of all that is voted on, images too: votes of another page are not those of this one."""
        digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=8)
        for row in told["rows"]:
            for image in (*row["sources"], *row["images"]):
                digest.update((self.folder / image).read_bytes())
        return digest.hexdigest()


def drawn_sides(count: int, seed: str) -> list[bool]:
    """Whether each row's two models change sides: half of the rows, in a drawn order."""
    sides = [bool(i % 2) for i in range(count)]
    random.Random(seed).shuffle(sides)
    return sides


# -- the page --------------------------------------------------------------------------------------------------------


def figure(images: Sequence[str], label: str, kind: str) -> str:
    """A column of a row: its images one below the other, or an empty place where it has none."""
    shown = "".join(f'<img class="{kind}" loading="lazy" src="{esc(image)}" alt="{esc(label)}">' for image in images)
    return f"<figure>{shown}<figcaption>{esc(label) if images else ''}</figcaption></figure>"


def article(row: dict[str, Any], models: Sequence[str], kind: str, *, edits: bool) -> str:
    """A prompt; with ``edits`` its sources stand in the first column, which every row of the page then has."""
    figures = figure(row["sources"], SOURCE, kind) if edits else ""
    figures += "".join(figure([image], model, kind) for image, model in zip(row["images"], models, strict=True))
    told = f"<b>{row['number'] + 1}.</b> {esc(row['prompt'])} <span class=soft>seed {row['seed']}</span>"
    return f"<article><p>{told}</p><div class=row>{figures}</div></article>"


def page(title: str, models: Sequence[str], data: dict[str, Any], width_px: int) -> str:
    """The whole document; of one model it only shows."""
    edits = any(row["sources"] for row in data["rows"])
    style = f"{text_of('side_by_side.css', HERE)}\n.row {{ --columns: {edits + len(models)}; }}"
    votes = len(models) > 1
    kind = "small" if width_px < SMALL_PX else ""
    rows = "".join(article(row, models, kind, edits=edits) for row in data["rows"])
    tabs = (
        '<nav role=tablist><button role=tab id="tab-vote">Vote blind</button>'
        '<button role=tab id="tab-names">Side by side, with names</button></nav>'
    )
    body = f'<main id="names"{" hidden" if votes else ""}>{rows}</main>'
    if votes:
        told = f'<script type="application/json" id="data">{in_script(data)}</script>'
        body = f"{ballot(models, len(data['rows']), kind)}{body}{told}"
    script = text_of("vote.js", HERE) if votes else ""
    header = f"<header><h1>{esc(title)}</h1>{tabs if votes else ''}</header>"
    return document(title, header + body, style, script, images="'self' file:")


def ballot(models: Sequence[str], count: int, kind: str) -> str:
    options = "".join(
        f'<option value="{i}-{j}">{esc(models[i])} and {esc(models[j])}</option>'
        for i, j in itertools.combinations(range(len(models)), 2)
    )

    def side(name: str, letter: str) -> str:
        return (
            f'<figure><img class="{kind}" id="{name}" alt="image {letter}">'
            f'<button id="choose-{name}">{letter} is better<kbd>{letter}</kbd></button></figure>'
        )

    return f"""<main id="vote">
<p class=note id="not-blind" hidden>The names have been on the screen: votes from here on are kept as not blind, and are not counted.</p>
<div class=bar><label>between <select id="pair">{options}</select></label><progress id="bar" value="0" max="{count}"></progress>
<span id="progress" class=soft></span><span class=grow></span>
<button class=main id="download">Save votes</button><button id="clear">Forget</button></div>
<div id="ballot"><p id="prompt"></p><figure id="edited" hidden><div id="sources" class="{kind}"></div><figcaption>{SOURCE}</figcaption></figure><div class=two>{side("left", "A")}{side("right", "B")}</div>
<div class=middle><button id="undo">Back<kbd>U</kbd></button><button id="tie">Tie<kbd>T</kbd></button><button id="skip">Skip<kbd>S</kbd></button></div></div>
<div id="done" hidden><p id="finished">Every prompt of this pair has a vote. Save the votes, then count them:
<code>python -m train_t2i votes votes.json</code></p><button id="skipped"></button> <button id="back">Back<kbd>U</kbd></button></div>
</main>"""
