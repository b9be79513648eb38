"""The tiny T5 and Qwen2.5-VL text encoders, and the tiny CLIP ones with the projections that SD3 asks for.

They stay frozen while a denoiser learns, so they must already know what a caption means: linear heads read the whole scene from
the last hidden state, at the end of the caption and at another place that has seen all of it.
Shapes: B captions, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.modular_pipelines.qwenimage.prompt_templates import QWENIMAGE_PROMPT_TEMPLATE
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from shapes.muon import mark_tables
from shapes.parallel import WORKERS, fit
from shapes.scenes import samples
from shapes.text_encoders import Heads, attributes
from shapes.tokenizer import new_qwen_tokenizer, new_t5_tokenizer
from shapes.world import World, batch_index, generator

T5_LENGTHS = (32, 77)  # most steps see the first; the second teaches what much padding looks like


@dataclass(frozen=True)
class T5Recipe:
    """T5 v1.1: gated GELU, no padding mask, as the pipelines run it."""

    seed: int = 22
    width: int = 160  # CLIP's two, side by side, must fit
    head_width: int = 32
    heads: int = 4
    feed_forward: int = 128
    layers: int = 3
    steps: int = 700
    batch_size: int = 64
    learning_rate: float = 1e-3
    long_every: int = 6


@dataclass(frozen=True)
class QwenRecipe:
    """The tiny Qwen2.5-VL's text part, whatever it is taught; the order of fields is part of a stage's digest."""

    seed: int
    width: int = 96
    heads: int = 3
    feed_forward: int = 192
    layers: int = 3


@dataclass(frozen=True)
class QwenTextRecipe(QwenRecipe):
    """With the smallest of vision towers, which no caption uses."""

    seed: int = 23
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3


def new_t5(recipe: T5Recipe, vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=recipe.width, d_kv=recipe.head_width, d_ff=recipe.feed_forward,
        num_layers=recipe.layers, num_heads=recipe.heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    with torch.no_grad():  # each head starts at a neighbour: a model without places finds their order hardly otherwise
        for head in range(recipe.heads):
            bucket = (
                1 + head // 2 + (config.relative_attention_num_buckets // 2) * (head % 2)
            )  # back, ahead, two back, ...
            bias[bucket, head] += 4.0
    return encoder


def new_qwen_vl(recipe: QwenRecipe, tokenizer: Any, **tower: int) -> Qwen2_5_VLForConditionalGeneration:
    """Untrained.  ``tower``: what its vision tower has different from the smallest."""
    number = tokenizer.convert_tokens_to_ids
    head_width = recipe.width // recipe.heads
    text = {
        "vocab_size": len(tokenizer), "hidden_size": recipe.width, "intermediate_size": recipe.feed_forward,
        "num_hidden_layers": recipe.layers, "num_attention_heads": recipe.heads, "num_key_value_heads": 1,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0,
            "mrope_section": [head_width // 4, head_width // 8, head_width // 8],
        },
        "bos_token_id": number("<|endoftext|>"), "eos_token_id": number("<|im_end|>"), "pad_token_id": number("<|endoftext|>"),
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": recipe.width,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [1], "in_channels": 3, **tower,
    }  # fmt: skip
    special = ("vision_start", "vision_end", "image_pad", "video_pad")
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), special))
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        **{name: number(f"<|{token}|>") for name, token in ids.items()},
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Reading:
    """Token numbers of all captions, and from which place on a row's states have seen all of its caption."""

    ids: Tensor  # (N, L)
    mask: Tensor  # (N, L)
    whole_from: Tensor  # (N,)
    ends: Tensor  # (N,) one past the last place that counts


def read_t5(tokenizer: Any, captions: list[str]) -> Reading:
    """T5 looks both ways: every place knows all, padding included."""
    told = tokenizer(captions, padding="max_length", max_length=T5_LENGTHS[-1], return_tensors="pt")
    ends = torch.full((len(captions),), T5_LENGTHS[-1])
    return Reading(told.input_ids, torch.ones_like(told.input_ids), told.attention_mask.sum(1) - 1, ends)


def read_qwen(tokenizer: Any, captions: list[str]) -> Reading:
    """Qwen looks back: only the template's tail, which comes after the caption, knows all."""
    head, tail = QWENIMAGE_PROMPT_TEMPLATE.split("{}")
    told = tokenizer([head + text + tail for text in captions], padding=True, return_tensors="pt")
    ends = told.attention_mask.sum(1)
    return Reading(told.input_ids, told.attention_mask, ends - len(tokenizer(tail).input_ids), ends)


def train_reader(
    name: str,
    encoder: Any,
    states: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[list[str]], Reading],
    world: World,
    recipe: Any,
    length_at: Callable[[int], int | None],
) -> dict[str, float]:
    """Train ``encoder`` so that linear heads tell the scene from ``states(ids, mask)`` (B, L, D)."""
    heads = Heads(recipe.width)
    mark_tables(encoder)
    text = read(world.captions)
    labels = torch.tensor([attributes(scene) for scene in world.scenes])

    def loss(part: tuple[Tensor, int | None, torch.Generator]) -> Tensor:
        index, length, g = part
        hidden = states(text.ids[index, :length], text.mask[index, :length])
        first, end = text.whole_from[index], text.ends[index].clamp(max=hidden.shape[1])
        some = first + ((end - first) * torch.rand(len(index), generator=g)).long()
        rows = torch.arange(len(index))
        return heads.loss(hidden[rows, first], labels[index]) + heads.loss(hidden[rows, some], labels[index])

    def parts(step: int) -> list[tuple[Tensor, int | None, torch.Generator]]:
        index = batch_index(recipe.seed, step, recipe.batch_size, len(world))
        halves = enumerate(index.chunk(WORKERS))
        return [(part, length_at(step), generator(recipe.seed, step, 1 + i)) for i, part in halves]

    trained = [p for p in encoder.parameters() if p.requires_grad]
    fit(name, loss, parts, [*trained, *heads.parameters()], recipe.steps, recipe.learning_rate, weight_decay=0.02)
    encoder.eval().requires_grad_(False)
    return {"last state tells the scene": measure(states, read, heads)}


@torch.no_grad()
def measure(states: Callable[[Tensor, Tensor], Tensor], read: Callable[[list[str]], Reading], heads: Heads) -> float:
    """Share of 500 held-out captions whose scene the linear heads read whole."""
    drawn = list(samples("heldout", 0, 500))
    text = read([caption for _, caption in drawn])
    hidden = states(text.ids, text.mask)
    labels = torch.tensor([attributes(scene) for scene, _ in drawn])
    return heads.right(hidden[torch.arange(len(drawn)), text.whole_from], labels).float().mean().item()


def train_t5(world: World, recipe: T5Recipe) -> tuple[T5EncoderModel, dict[str, float]]:
    torch.manual_seed(recipe.seed)
    tokenizer = new_t5_tokenizer()
    encoder = new_t5(recipe, len(tokenizer))
    short, long = T5_LENGTHS
    quality = train_reader(
        "T5", encoder, lambda ids, mask: encoder(ids)[0], lambda captions: read_t5(tokenizer, captions), world, recipe,
        lambda step: long if step % recipe.long_every == 0 else short,
    )  # fmt: skip
    return encoder, quality


def train_qwen_text(
    world: World, recipe: QwenTextRecipe
) -> tuple[Qwen2_5_VLForConditionalGeneration, dict[str, float]]:
    torch.manual_seed(recipe.seed)
    tokenizer = new_qwen_tokenizer()
    encoder = new_qwen_vl(recipe, tokenizer)
    encoder.model.visual.requires_grad_(False)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        return encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]

    quality = train_reader(
        "Qwen2.5-VL", encoder, states, lambda captions: read_qwen(tokenizer, captions), world, recipe, lambda step: None
    )
    return encoder, quality


def with_projection(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """An encoder as SD3 has them: what has no projection gets one that changes nothing."""
    if isinstance(encoder, CLIPTextModelWithProjection):
        return encoder
    config = encoder.config
    config.projection_dim = config.hidden_size
    made = CLIPTextModelWithProjection(config)
    prefix = "" if any(key.startswith("text_model.") for key in encoder.state_dict()) else "text_model."
    known = {prefix + key: value for key, value in encoder.state_dict().items()}
    missing, unexpected = made.load_state_dict(known, strict=False)
    assert missing == ["text_projection.weight"], missing
    assert not unexpected, unexpected
    with torch.no_grad():
        made.text_projection.weight.copy_(torch.eye(config.hidden_size))
    return made.eval().requires_grad_(False)
