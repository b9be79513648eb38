"""ImageReward's BLIP: a ViT, a BERT that cross-attends to it, and a head, read from the authors' own file.

Shapes: B batch, h and w px of the input, P patches and one class token, L text tokens.
The parts are transformers' BlipVisionModel and BlipTextModel, which are the same architecture under other names.  Sizes
are read off the tensors; heads are 64 wide, as in every ViT and BERT that BLIP was trained with.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards.base import RewardError
from rewards.head import regression_head
from rewards.weights import Shapes, check_shapes, file_kind, read_shapes, read_state

HEAD_WIDTH = 64
VISION_EPS = 1e-6
MED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}  # med_config.json, beside the sizes
# Of BLIP's pretraining, in the file and without a part in the score.
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
VOCABULARY = "vocab.txt"
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
LAYER_NAMES = {
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}
LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """Where the weights are, and the sizes that they have."""

    weights: Path
    vocabulary: Path
    image_size_px: int
    patch_px: int
    vision_width: int
    vision_layers: int
    vision_mlp: int
    text: tuple[tuple[str, Any], ...]  # what BlipTextConfig is told


def resolve(weights: Path) -> Source:
    """A weights file -> its Source.  Raises RewardError; reads no tensor."""
    file_kind(weights)
    shapes = {to_parts(name): shape for name, shape in read_shapes(weights).items()}
    try:
        patches, width = shapes["vision.embeddings.position_embedding"][1:]
        patch_px = shapes["vision.embeddings.patch_embedding.weight"][-1]
        vocabulary_size, text_width = shapes["text.embeddings.word_embeddings.weight"]
        text = {
            "vocab_size": vocabulary_size,
            "hidden_size": text_width,
            "encoder_hidden_size": width,
            "num_hidden_layers": count(shapes, "text.encoder.layer."),
            "num_attention_heads": text_width // HEAD_WIDTH,
            "intermediate_size": shapes["text.encoder.layer.0.intermediate.dense.weight"][0],
            "max_position_embeddings": shapes["text.embeddings.position_embeddings.weight"][0],
            **MED,
        }
        vision_mlp = shapes["vision.encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        reason = f"is not ImageReward: it has no {error}, or one of another shape"
        raise RewardError(weights, reason, "give ImageReward.pt of THUDM/ImageReward") from None
    side = round((patches - 1) ** 0.5)
    if side * side != patches - 1 or min(width, text_width) % HEAD_WIDTH or width % HEAD_WIDTH:
        raise RewardError(
            weights, f"has {patches - 1} patches {width} wide", "give ImageReward.pt of THUDM/ImageReward"
        )
    vocabulary, vision_layers = weights.parent / VOCABULARY, count(shapes, "vision.encoder.layers.")
    told = tuple((text | read_med(weights.parent / "med_config.json")).items())
    source = Source(weights, vocabulary, side * patch_px, patch_px, width, vision_layers, vision_mlp, told)
    check_shapes(weights, without_unused(read_shapes(weights)), wanted_shapes(source), "ImageReward")
    return source


def count(shapes: Shapes, prefix: str) -> int:
    """How many layers stand under a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def read_med(path: Path) -> dict[str, Any]:
    """The values of ``med_config.json`` that a score depends on, where there is one.  Raises RewardError."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
        return {key: values[key] for key in (*MED, "num_attention_heads") if key in values}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise RewardError(path, f"cannot be read as JSON ({error})", "download it again, or remove it") from None


class Blip(nn.Module):
    """``vision``, ``text`` and ``head``."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=source.vision_width, intermediate_size=source.vision_mlp, patch_size=source.patch_px,
            num_hidden_layers=source.vision_layers, num_attention_heads=source.vision_width // HEAD_WIDTH,
            image_size=source.image_size_px, hidden_act="gelu", layer_norm_eps=VISION_EPS, attention_dropout=0.0,
        )  # fmt: skip
        text = BlipTextConfig(
            is_decoder=True,  # builds the cross-attention; each call says that no token is hidden from an earlier one
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            bos_token_id=None, eos_token_id=None, sep_token_id=None, **dict(source.text),
        )  # fmt: skip
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = regression_head(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, h, w), (B, L), (B, L) -> (B,) before it is standardised."""
        seen = self.vision(pixel_values=pixels).last_hidden_state  # (B, 1 + P, D)
        read = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        first = read[:, 0].to(next(self.head.parameters()).dtype)
        return self.head.layers(first)[:, 0]  # type: ignore[operator]


def to_parts(name: str) -> str:
    """A name of the authors' file -> of ``Blip``; one that is not theirs stays as it is."""
    if name.startswith("blip.visual_encoder."):
        inner = name.removeprefix("blip.visual_encoder.")
        layer = LAYER.fullmatch(inner)
        if layer:
            return f"vision.encoder.layers.{layer[1]}.{LAYER_NAMES.get(layer[2], layer[2])}.{layer[3]}"
        return f"vision.{VISION_NAMES.get(inner, inner)}"
    if name.startswith("blip.text_encoder."):
        return f"text.{name.removeprefix('blip.text_encoder.')}"
    return f"head.{name.removeprefix('mlp.')}" if name.startswith("mlp.") else name


def without_unused(state: dict[str, Any]) -> dict[str, Any]:
    """Under the names of ``Blip``, without what belongs to BLIP's pretraining alone."""
    return {to_parts(name): value for name, value in state.items() if not UNUSED.fullmatch(name)}


def wanted_shapes(source: Source) -> Shapes:
    """Name -> shape of every tensor that is needed."""
    return {name: tuple(tensor.shape) for name, tensor in empty(source).state_dict().items()}


def empty(source: Source) -> Blip:
    """The model on the meta device."""
    try:
        with torch.device("meta"):
            return Blip(source)
    except Exception as error:  # values of a med_config.json of the user's
        path = source.weights.parent / "med_config.json"
        reason = f"describes no text encoder that can be built ({type(error).__name__}: {error})"
        raise RewardError(path, reason, "remove it: the published values are known") from None


def load(source: Source, dtype: torch.dtype, device: torch.device, checkpointing: bool) -> Blip:
    """The model with its weights, frozen.  Raises RewardError."""
    model = empty(source)
    state = without_unused(read_state(source.weights))
    check_shapes(
        source.weights,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        wanted_shapes(source),
        "ImageReward",
    )
    wide = torch.promote_types(dtype, torch.float32)
    for name in list(state):
        state[name] = state.pop(name).to(device=device, dtype=wide if name.startswith("head.") else dtype)
    model.load_state_dict(state, strict=True, assign=True)
    positions = torch.arange(model.text.config.max_position_embeddings, device=device)[None]
    model.text.embeddings.position_ids = positions  # not part of the state
    if checkpointing:  # transformers recomputes in training mode only; there is no dropout for it to switch on
        model.vision.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).train(checkpointing)


def tokenizer(source: Source) -> Any:
    """bert-base-uncased's tokenizer, from the user's vocabulary, with BLIP's two marks.  Raises RewardError."""
    path, hint = source.vocabulary, "put bert-base-uncased's vocab.txt beside the weights"
    try:
        words = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise RewardError(path, "there is no such file", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(path, f"cannot be read ({error})", hint) from None
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word not in words]
    size = dict(source.text)["vocab_size"]
    if missing or len(words) + 2 != size:  # [DEC] and [ENC] follow
        reason = f"has {len(words)} words where the weights need {size - 2}" if not missing else f"has no {missing[0]}"
        raise RewardError(path, reason, hint)
    made = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    made.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return made
