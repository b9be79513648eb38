"""What the encoder of edits is trained on: edits as the pipelines tell them, and what of them is to be read.

About half of the training edits have objects of any colour.  An encoder that sees six colours alone learns which shapes never come in
which, and reads a held-out pair as one that it knows; colours in between take that knowledge away, and show no held-out pair.
Shapes: N edits, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.modular_pipelines.qwenimage import prompt_templates as templates
from torch import Tensor

from shapes.edit_codes import facts
from shapes.edit_pictures import Picture, pictures
from shapes.edits import KINDS, Edit, sample
from shapes.free_colours import exact_target, freely_coloured
from shapes.scenes import rng_for
from shapes.text_encoders import CLASSES, attributes

HEAD, TAIL = templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE.split("{}")
CUT = templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE_START_IDX  # tokens of HEAD, which the pipelines cut off
NAMED = (0, 1, 2, 4, 5, 7)  # of ``attributes``: all but the two colours, which are read as numbers
NAMED_CLASSES = tuple(CLASSES[i] for i in NAMED)


@dataclass(frozen=True)
class Rows:
    """Edits of as many sources each."""

    edits: list[Edit]
    pictures: Tensor  # (N, sources, 3, 64, 64) uint8
    wanted_rgb: Tensor  # (N, 2, 3) colours of the target's objects in [0, 1], NaN where there is none
    shown_rgb: Tensor  # (N, sources, 2, 3)


def _rgb(picture: Picture) -> Tensor:
    known = torch.tensor([p.rgb for p in picture.placed])
    return torch.cat([known, torch.full((2 - len(known), 3), float("nan"))])


def drawn(split: str, seed: int, count: int, sources: int, free: bool = False) -> Rows:
    """Edits of so many sources; `free`: three of four with colours of their own where the instruction lets them."""
    kinds = tuple(kind for kind in KINDS if (kind == "compose") == (sources == 2))
    edits, shown, wanted = [], [], []
    for index in range(count):
        edit = sample(split, seed, index, kinds)
        before, _ = pictures(edit, rng_for(split, seed, index, stream=3))
        if free and index % 4:
            before = freely_coloured(edit, before, rng_for(split, seed, index, stream=4))
        edits.append(edit)
        shown.append(before)
        wanted.append(_rgb(exact_target(before, edit)))
    pixels = np.stack([[picture.paint() for picture in before] for before in shown])
    return Rows(
        edits,
        torch.from_numpy((pixels * 255 + 0.5).astype(np.uint8)).permute(0, 1, 4, 2, 3).contiguous(),
        torch.stack(wanted),
        torch.stack([torch.stack([_rgb(picture) for picture in before]) for before in shown]),
    )


@dataclass(frozen=True)
class Told:
    """Rows as the encoder reads them."""

    rows: Rows
    processor: Any  # of text and pictures
    ids: Tensor  # (N, L)
    mask: Tensor  # (N, L)
    places: Tensor  # (3, N, L) M-RoPE
    seen_at: Tensor  # (N, sources) where a picture has been seen
    whole_from: Tensor  # (N,) where all of the text has been read
    ends: Tensor  # (N,) one past the last token
    wanted: Tensor  # (N, 7) kind and what is named of the target scene, as class numbers
    shown: Tensor  # (N, sources, 6) of the source scenes
    facts: Tensor  # (N, S, F) of the target scene, what the states behind the text are to say


def texts_of(edits: Sequence[Edit], plain: bool = False) -> list[str]:
    """What QwenImageEditPlusPipeline makes of instructions, or QwenImageEditPipeline (`plain`)."""
    if plain:
        return [templates.QWENIMAGE_EDIT_PROMPT_TEMPLATE.format(edit.instruction) for edit in edits]
    numbers = [range(1, len(edit.sources) + 1) for edit in edits]
    prefixes = ["".join(map(templates.QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE.format, each)) for each in numbers]
    return [HEAD + prefix + edit.instruction + TAIL for prefix, edit in zip(prefixes, edits)]


def tell(encoder: Any, processor: Any, rows: Rows, plain: bool = False) -> Told:
    """Rows in the pipeline's template, or in the plain one's."""
    texts, images = texts_of(rows.edits, plain), list(rows.pictures.flatten(0, 1))
    read = processor(text=texts, images=images, padding=True, return_tensors="pt")
    ids, mask = read["input_ids"], read["attention_mask"]
    kinds = (ids == encoder.config.image_token_id).int()
    places, _ = encoder.model.get_rope_index(ids, kinds, read["image_grid_thw"], attention_mask=mask)
    seen_at = (ids == encoder.config.vision_end_token_id).nonzero()[:, 1].view(len(texts), -1)
    ends = mask.sum(1)
    wanted = [[KINDS.index(edit.kind), *_named(attributes(edit.target))] for edit in rows.edits]
    shown = [[_named(attributes(scene)) for scene in edit.sources] for edit in rows.edits]
    tail = len(processor.tokenizer(TAIL).input_ids)
    said = torch.stack([facts(edit.target, rgb) for edit, rgb in zip(rows.edits, rows.wanted_rgb)])
    return Told(
        rows, processor, ids, mask, places, seen_at, ends - tail, ends, torch.tensor(wanted), torch.tensor(shown), said
    )


def _named(numbers: list[int]) -> list[int]:
    return [numbers[i] for i in NAMED]
