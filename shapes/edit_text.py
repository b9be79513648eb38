"""The tiny Qwen2.5-VL of the edit pipelines: it reads an instruction below the pictures that it is about.

It stays frozen while the transformer learns, so its last states must already know what is wanted.  First linear heads read the kind
of the edit and the whole target scene at the end of the text, and the scene of a picture at the end of the picture; then the states
behind the text come to say the target scene themselves (edit_codes.py).
The text is that of QwenImageEditPlusPipeline.  Image tokens have their places in three dimensions (M-RoPE), as the model was made
for; the stock pipelines leave out the `mm_token_type_ids` that this takes in transformers 5.
Shapes: B edits, L tokens, P pictures of a batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from shapes.edit_codes import SAID, directions, right
from shapes.edit_rows import CUT, NAMED_CLASSES, Told, drawn, tell
from shapes.edits import KINDS
from shapes.long_text_encoders import QwenRecipe, new_qwen_vl
from shapes.muon import mark_tables
from shapes.parallel import fit
from shapes.render import COLOUR_RGB
from shapes.text_encoders import Heads
from shapes.tokenizer import new_qwen_edit_tokenizer, new_qwen_tokenizer
from shapes.world import batch_index, generator

RGB_WEIGHT = 10.0  # of squared errors beside cross-entropies
Part = tuple[Told, Tensor, torch.Generator]  # rows, which of them, what is drawn for them


@dataclass(frozen=True)
class QwenEditTextRecipe(QwenRecipe):
    """It starts from the tiny Qwen-Image's encoder; a source of 64 px is 16 tokens, of patches two by two."""

    seed: int = 24
    vision_width: int = 40
    vision_feed_forward: int = 80
    patch_px: int = 8
    edits: int = 24576
    steps: int = 4000  # of two sources it knows nothing before step 1000, and then within 500
    batch_sizes: tuple[int, int] = (32, 16)  # edits of one source, of two
    learning_rate: float = 2e-3
    saying_steps: int = 4000
    saying_learning_rate: float = 2e-3
    plain_every: int = 3  # every so many steps, edits of one source come in the plain pipeline's template


def new_processor(recipe: QwenEditTextRecipe, tokenizer: Any) -> Qwen2VLProcessor:
    """That of the pipeline folder; its class asks for a reader of videos too."""
    told = {"patch_size": recipe.patch_px, "merge_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}  # areas in px
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**told, size=size), tokenizer, Qwen2VLVideoProcessor(**told))


def new_edit_encoder(
    recipe: QwenEditTextRecipe, tokenizer: Any, captions: Qwen2_5_VLForConditionalGeneration
) -> Qwen2_5_VLForConditionalGeneration:
    """The encoder of `captions`, with an untrained tower and a table of words as long as this tokenizer's."""
    encoder = new_qwen_vl(
        recipe, tokenizer, hidden_size=recipe.vision_width, intermediate_size=recipe.vision_feed_forward,
        patch_size=recipe.patch_px,
    )  # fmt: skip
    known = {
        key: value for key, value in captions.model.language_model.state_dict().items() if "embed_tokens" not in key
    }
    _, unexpected = encoder.model.language_model.load_state_dict(known, strict=False)
    assert not unexpected, unexpected
    numbers = new_qwen_tokenizer().get_vocab()
    table, old = encoder.get_input_embeddings().weight, captions.get_input_embeddings().weight
    with torch.no_grad():
        for token, number in tokenizer.get_vocab().items():
            if token in numbers:
                table[number] = old[numbers[token]]
    return encoder


class Reader(nn.Module):
    """Linear readers of a state: classes, and the colours of two objects as numbers.

    A colour is a number so that what is learnt of colours in between holds for those that have names.
    """

    def __init__(self, width: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.named = Heads(width, classes)
        self.rgb = nn.Linear(width, 6)

    def loss(self, hidden: Tensor, labels: Tensor, rgb: Tensor) -> Tensor:
        """hidden (B, D), labels (B, attributes), rgb (B, 2, 3) with NaN for no object."""
        apart = self.rgb(hidden).view_as(rgb) - rgb.nan_to_num()
        there = ~rgb.isnan()
        return self.named.loss(hidden, labels) + RGB_WEIGHT * apart[there].square().mean()

    def right(self, hidden: Tensor, labels: Tensor, rgb: Tensor) -> Tensor:
        """(B,) bool: every attribute is read correctly; a colour is the nearest that has a name."""
        table = torch.tensor(list(COLOUR_RGB.values()))

        def name(colours: Tensor) -> Tensor:
            return torch.cdist(colours.reshape(-1, 3), table).argmin(1).view(-1, 2)

        same = name(self.rgb(hidden).view_as(rgb)) == name(rgb.nan_to_num())
        return self.named.right(hidden, labels) & (same | rgb.isnan().any(-1)).all(1)


def states(encoder: Any, told: Told, index: Tensor) -> Tensor:
    """Last states of some rows, (B, L, D).

    The head of the template is the same in every row and sees nothing that follows: it is read once.
    """
    read = told.processor.image_processor(list(told.rows.pictures[index].flatten(0, 1)), return_tensors="pt")
    length = int(told.ends[index].max())
    head = encoder.model.language_model(
        input_ids=told.ids[:1, :CUT], position_ids=told.places[:, :1, :CUT], use_cache=True
    )
    cache = DynamicCache()
    for number, layer in enumerate(head.past_key_values.layers):
        keys, values = (each.expand(len(index), -1, -1, -1) for each in (layer.keys, layer.values))
        cache.update(keys, values, number)
    rest = encoder.model(
        input_ids=told.ids[index, CUT:length], attention_mask=told.mask[index, :length],
        position_ids=told.places[:, index, CUT:length], past_key_values=cache, pixel_values=read["pixel_values"],
        image_grid_thw=read["image_grid_thw"],
    )  # fmt: skip
    return torch.cat([head.last_hidden_state.expand(len(index), -1, -1), rest.last_hidden_state], dim=1)


def train_edit_text(
    recipe: QwenEditTextRecipe, captions: Qwen2_5_VLForConditionalGeneration
) -> tuple[Qwen2_5_VLForConditionalGeneration, dict[str, float]]:
    """Train on edits of one source and of two at every step; `captions` is the encoder that it starts from."""
    torch.manual_seed(recipe.seed)
    tokenizer = new_qwen_edit_tokenizer()
    processor, encoder = new_processor(recipe, tokenizer), new_edit_encoder(recipe, tokenizer, captions)
    encoder.train().requires_grad_(True)
    mark_tables(encoder)
    wants, shows = Reader(recipe.width, (len(KINDS), *NAMED_CLASSES)), Reader(recipe.width, NAMED_CLASSES)
    one, two = (drawn("train", recipe.seed, recipe.edits, sources, free=True) for sources in (1, 2))
    lessons = Lessons(
        tell(encoder, processor, one), tell(encoder, processor, one, plain=True), tell(encoder, processor, two)
    )
    read(encoder, wants, shows, lessons, recipe)
    say(encoder, shows, lessons, recipe)
    encoder.eval().requires_grad_(False)
    return encoder, measure(encoder, processor, shows, recipe)


@dataclass(frozen=True)
class Lessons:
    """Edits as the encoder reads them: of one source in both templates, of two."""

    named: Told
    plain: Told
    pairs: Told

    def parts(self, recipe: QwenEditTextRecipe, step: int) -> list[Part]:
        """What the two threads of a step read."""
        single = self.plain if step % recipe.plain_every == 0 else self.named
        return [
            (told, batch_index(recipe.seed + i, step, size, recipe.edits), generator(recipe.seed, step, 1 + i))
            for i, (told, size) in enumerate(zip((single, self.pairs), recipe.batch_sizes))
        ]


def read(encoder: Any, wants: Reader, shows: Reader, lessons: Lessons, recipe: QwenEditTextRecipe) -> None:
    """Linear heads read the whole target from the states behind the text."""

    def loss(part: Part) -> Tensor:
        told, index, g = part
        hidden, row = states(encoder, told, index), torch.arange(len(index))
        first, end = told.whole_from[index], told.ends[index]
        some = first + ((end - first) * torch.rand(len(index), generator=g)).long()
        wanted = [wants.loss(hidden[row, at], told.wanted[index], told.rows.wanted_rgb[index]) for at in (first, some)]
        return wanted[0] + wanted[1] + shows.loss(*_seen(hidden, told, index))

    parameters = [*encoder.parameters(), *wants.parameters(), *shows.parameters()]
    fit("Qwen2.5-VL reads edits", loss, lambda step: lessons.parts(recipe, step), parameters, recipe.steps,
        recipe.learning_rate, weight_decay=0.02)  # fmt: skip


def say(encoder: Any, shows: Reader, lessons: Lessons, recipe: QwenEditTextRecipe) -> None:
    """The states behind the text become the facts of the target, each along a direction of its own."""
    ways = directions(recipe.width, recipe.seed)

    def loss(part: Part) -> Tensor:
        told, index, _ = part
        hidden = states(encoder, told, index)
        apart = _behind(hidden, told, index) - told.facts[index] @ ways
        return apart.square().mean() + shows.loss(*_seen(hidden, told, index))

    fit("Qwen2.5-VL says scenes", loss, lambda step: lessons.parts(recipe, step), [*encoder.parameters(), *shows.parameters()],
        recipe.saying_steps, recipe.saying_learning_rate, weight_decay=0.02)  # fmt: skip


def _behind(hidden: Tensor, told: Told, index: Tensor) -> Tensor:
    """(B, S, D): the states that follow the text."""
    at = told.whole_from[index, None] + torch.arange(len(SAID))
    return hidden[torch.arange(len(index))[:, None], at]


def _seen(hidden: Tensor, told: Told, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States at the end of all pictures of some rows, and what these show."""
    at = hidden[torch.arange(len(index))[:, None], told.seen_at[index]]
    return at.flatten(0, 1), told.shown[index].flatten(0, 1), told.rows.shown_rgb[index].flatten(0, 1)


@torch.no_grad()
def measure(
    encoder: Any, processor: Any, shows: Reader, recipe: QwenEditTextRecipe, count: int = 300
) -> dict[str, float]:
    """Share of held-out edits whose last states say all of the target, and of whose sources the heads read all."""
    scores, ways = {}, directions(recipe.width, recipe.seed)
    for sources, plain, name in ((1, False, "one source"), (1, True, "one source, plain"), (2, False, "two sources")):
        told = tell(encoder, processor, drawn("heldout", 0, count, sources), plain)
        index = torch.arange(count)
        hidden = states(encoder, told, index)
        wanted = right(_behind(hidden, told, index), told.facts, ways)
        shown = shows.right(*_seen(hidden, told, index))
        scores[f"last states say the target, {name}"] = wanted.float().mean().item()
        scores[f"last state tells the source, {name}"] = shown.float().mean().item()
    return scores
