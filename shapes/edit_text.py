"""The tiny Qwen2.5-VL of the edit pipelines: it reads an instruction below the pictures that it is about.

It stays frozen while the transformer learns, so its last states must already know what is wanted: linear heads read the kind of the
edit and the whole target scene at the end of the text, and the scene of a picture at the end of the picture.
The text is that of QwenImageEditPlusPipeline.  Image tokens have their places in three dimensions (M-RoPE), as the model was made
for; the stock pipelines leave out the `mm_token_type_ids` that this takes in transformers 5.
Shapes: B edits, L tokens, P pictures of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.modular_pipelines.qwenimage import prompt_templates as templates
from torch import Tensor
from transformers import (
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from shapes.edit_pictures import draw
from shapes.edits import KINDS, Edit
from shapes.long_text_encoders import new_qwen_vl
from shapes.muon import mark_tables
from shapes.parallel import fit
from shapes.text_encoders import CLASSES, Heads, attributes
from shapes.tokenizer import new_qwen_edit_tokenizer, new_qwen_tokenizer
from shapes.world import batch_index, generator

HEAD, TAIL = templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE.split("{}")
CUT = templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE_START_IDX  # tokens of HEAD, which the pipelines cut off


@dataclass(frozen=True)
class QwenEditTextRecipe:
    """It starts from the tiny Qwen-Image's encoder; a source of 64 px is 16 tokens, of patches two by two."""

    seed: int = 24
    width: int = 96
    heads: int = 3
    feed_forward: int = 192
    layers: int = 3
    vision_width: int = 40
    vision_feed_forward: int = 80
    patch_px: int = 8
    edits: int = 6144
    steps: int = 700
    batch_sizes: tuple[int, int] = (32, 16)  # edits of one source, of two
    learning_rate: float = 2e-3
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


@dataclass(frozen=True)
class Told:
    """Edits of as many sources each, as the encoder reads them."""

    pictures: Tensor  # (N, sources, 3, 64, 64) uint8
    ids: Tensor  # (N, L)
    mask: Tensor  # (N, L)
    places: Tensor  # (3, N, L) M-RoPE
    seen_at: Tensor  # (N, sources) where a picture has been seen
    whole_from: Tensor  # (N,) where all of the text has been read
    ends: Tensor  # (N,) one past the last token
    wanted: Tensor  # (N, 9) kind and target scene, as class numbers
    shown: Tensor  # (N, sources, 8) source scenes


def texts_of(edits: Sequence[Edit], plain: bool = False) -> list[str]:
    """What QwenImageEditPlusPipeline makes of instructions, or QwenImageEditPipeline (`plain`)."""
    if plain:
        return [templates.QWENIMAGE_EDIT_PROMPT_TEMPLATE.format(edit.instruction) for edit in edits]
    numbers = [range(1, len(edit.sources) + 1) for edit in edits]
    pictures = ["".join(map(templates.QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE.format, each)) for each in numbers]
    return [HEAD + prefix + edit.instruction + TAIL for prefix, edit in zip(pictures, edits)]


def tell(encoder: Any, processor: Any, edits: Sequence[Edit], pictures: Tensor, plain: bool = False) -> Told:
    """edits of as many sources each, pictures (N, sources, 3, 64, 64) uint8; `plain` as in ``texts_of``."""
    read = processor(
        text=texts_of(edits, plain), images=list(pictures.flatten(0, 1)), padding=True, return_tensors="pt"
    )
    ids, mask = read["input_ids"], read["attention_mask"]
    kinds = (ids == encoder.config.image_token_id).int()
    places, _ = encoder.model.get_rope_index(ids, kinds, read["image_grid_thw"], attention_mask=mask)
    seen_at = (ids == encoder.config.vision_end_token_id).nonzero()[:, 1].view(len(edits), -1)
    ends = mask.sum(1)
    wanted = torch.tensor([[KINDS.index(edit.kind), *attributes(edit.target)] for edit in edits])
    shown = torch.tensor([[attributes(scene) for scene in edit.sources] for edit in edits])
    tail = len(processor.tokenizer(TAIL).input_ids)
    return Told(pictures, ids, mask, places, seen_at, ends - tail, ends, wanted, shown)


def drawn(split: str, seed: int, count: int, sources: int) -> tuple[list[Edit], Tensor]:
    """Edits of so many sources and the pictures of these, (N, sources, 3, 64, 64) uint8."""
    kinds = tuple(kind for kind in KINDS if (kind == "compose") == (sources == 2))
    made = [draw(split, seed, index, kinds) for index in range(count)]
    pictures = [torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in shown]) for _, shown, _ in made]
    return [edit for edit, _, _ in made], torch.stack(pictures)


def states(encoder: Any, processor: Any, told: Told, index: Tensor) -> Tensor:
    """Last states of some rows, (B, L, D).

    The head of the template is the same in every row and sees nothing that follows: it is read once.
    """
    read = processor.image_processor(list(told.pictures[index].flatten(0, 1)), return_tensors="pt")
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
    wants, shows = Heads(recipe.width, (len(KINDS), *CLASSES)), Heads(recipe.width)
    one, two = (drawn("train", recipe.seed, recipe.edits, sources) for sources in (1, 2))
    named, plain, pairs = (
        tell(encoder, processor, *one), tell(encoder, processor, *one, plain=True), tell(encoder, processor, *two)
    )  # fmt: skip

    def loss(part: tuple[Told, Tensor, torch.Generator]) -> Tensor:
        rows_told, index, g = part
        hidden, rows = states(encoder, processor, rows_told, index), torch.arange(len(index))
        first, end = rows_told.whole_from[index], rows_told.ends[index]
        some = first + ((end - first) * torch.rand(len(index), generator=g)).long()
        wanted = sum(wants.loss(hidden[rows, at], rows_told.wanted[index]) for at in (first, some))
        seen = hidden[rows[:, None], rows_told.seen_at[index]]
        return wanted + shows.loss(seen.flatten(0, 1), rows_told.shown[index].flatten(0, 1))

    def parts(step: int) -> list[tuple[Told, Tensor, torch.Generator]]:
        single = plain if step % recipe.plain_every == 0 else named
        return [
            (rows, batch_index(recipe.seed + i, step, size, recipe.edits), generator(recipe.seed, step, 1 + i))
            for i, (rows, size) in enumerate(zip((single, pairs), recipe.batch_sizes))
        ]

    parameters = [*encoder.parameters(), *wants.parameters(), *shows.parameters()]
    fit("Qwen2.5-VL of edits", loss, parts, parameters, recipe.steps, recipe.learning_rate, weight_decay=0.02)
    encoder.eval().requires_grad_(False)
    return encoder, measure(encoder, processor, wants, shows)


@torch.no_grad()
def measure(encoder: Any, processor: Any, wants: Heads, shows: Heads, count: int = 300) -> dict[str, float]:
    """Share of held-out edits of which the heads read all, from one source and from two."""
    scores = {}
    for sources, plain, name in ((1, False, "one source"), (1, True, "one source, plain"), (2, False, "two sources")):
        told = tell(encoder, processor, *drawn("heldout", 0, count, sources), plain)
        hidden, rows = states(encoder, processor, told, torch.arange(count)), torch.arange(count)
        wanted = wants.right(hidden[rows, told.whole_from], told.wanted)
        shown = shows.right(hidden[rows[:, None], told.seen_at].flatten(0, 1), told.shown.flatten(0, 1))
        scores[f"last state tells the target, {name}"] = wanted.float().mean().item()
        scores[f"last state tells the source, {name}"] = shown.float().mean().item()
    return scores


def tell_token_types(encoder: Any) -> Any:
    """Have an encoder that a stock pipeline calls number the tokens of pictures by row and column, as it was trained.

    Returns the hook, which can be removed.
    """

    def told(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if named.get("image_grid_thw") is None:
            return arguments, named
        return arguments, named | {"mm_token_type_ids": (named["input_ids"] == module.config.image_token_id).int()}

    return encoder.register_forward_pre_hook(told, with_kwargs=True)
