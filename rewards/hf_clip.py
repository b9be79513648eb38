"""Towers in transformers' CLIPModel layout, read as open_clip's.

The two are one architecture under two sets of names.  transformers keeps query, key and value apart where open_clip
keeps one matrix, and multiplies projections from the other side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig

from rewards.base import RewardError

CONFIG_NAME = "config.json"
NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
IN_LAYERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
BUFFERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}  # of older transformers


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under transformers' names -> under open_clip's; others stay as they are.  Meta tensors serve shapes.

    A name that is neither keeps its name, and an incomplete query, key and value stay apart: both then fail the
    comparison with what a tower needs.
    """
    if not any(name.startswith("vision_model.") for name in state):
        return dict(state)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        if name in BUFFERS:
            continue
        if name in NAMES:
            found[NAMES[name]] = tensor
        elif name in TRANSPOSED and tensor.ndim == 2:
            found[TRANSPOSED[name]] = tensor.T.contiguous()
        elif layer and layer[3] in IN_LAYERS:
            found[f"{TOWERS[layer[1]]}.resblocks.{layer[2]}.{IN_LAYERS[layer[3]]}.{layer[4]}"] = tensor
        elif layer and layer[3] == "self_attn.q_proj":
            three = [state.get(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
            if all(part is not None and part.shape == tensor.shape for part in three):
                found[f"{TOWERS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"] = torch.cat(three)  # type: ignore[arg-type]
        elif not (layer and layer[3] in ("self_attn.k_proj", "self_attn.v_proj")):
            found[name] = tensor
    return found


def read_model_cfg(path: Path) -> dict[str, Any]:
    """``config.json`` of a CLIPModel -> open_clip's ``model_cfg``.  Raises RewardError."""
    try:
        values = json.loads(path.read_bytes())
        if values.get("model_type") != "clip":
            raise RewardError(
                path, f"is the config of a {values.get('model_type')!r}, not of a clip", "give a CLIPModel"
            )
        config = CLIPConfig.from_dict(values)
    except RewardError:
        raise
    except Exception as error:  # a config of the user's: whatever JSON or transformers makes of it
        raise RewardError(path, f"cannot be read ({type(error).__name__}: {error})", "download it again") from None
    vision, text = config.vision_config, config.text_config
    acts, epsilons = {vision.hidden_act, text.hidden_act}, {vision.layer_norm_eps, text.layer_norm_eps}
    if not acts <= {"gelu", "quick_gelu"} or len(acts) != 1 or epsilons != {1e-5}:
        reason = f"has activations {sorted(acts)} and layer_norm_eps {sorted(epsilons)}"
        raise RewardError(path, reason, "only one of gelu and quick_gelu for both towers, and 1e-5, are built here")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }
