"""The names that kohya's trainers (sd-scripts, musubi-tuner) give layers: ``lora_unet_`` and the layer's, dots as ``_``.

They train the models in their publishers' layout: SDXL's blocks are numbered through (SGM), and SD3 and FLUX.1 compute queries,
keys and values in one layer.  LoRAs of such parts become one of the whole: A's rows below each other, B's blocks along
a diagonal, which is the same product exactly (sd-scripts, ``networks/convert_flux_lora.py``).  ComfyUI knows all of these names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train_t2i.errors import UserError

Parts = tuple[str, ...]  # diffusers' names of the layers that make up one of the publisher's, in order
QWEN = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus")  # its layers have the names that diffusers has
NETWORK_MODULES = {  # family -> what these trainers load such a file with
    "sdxl": "networks.lora", "sd3": "networks.lora_sd3", "flux": "networks.lora_flux",
    **dict.fromkeys(QWEN, "networks.lora_qwen_image"),
}  # fmt: skip

SGM_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
SGM_TOP = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip

IMAGE_QKV, TEXT_QKV = (
    ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)  # fmt: skip
FLUX_DOUBLE: dict[str, Parts] = {
    "img_attn.qkv": IMAGE_QKV, "img_attn.proj": ("attn.to_out.0",), "img_mod.lin": ("norm1.linear",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_attn.qkv": TEXT_QKV, "txt_attn.proj": ("attn.to_add_out",), "txt_mod.lin": ("norm1_context.linear",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
}  # fmt: skip
FLUX_SINGLE: dict[str, Parts] = {
    "linear1": (*IMAGE_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
}  # fmt: skip
SD3_JOINT: dict[str, Parts] = {
    "x_block.attn.qkv": IMAGE_QKV, "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": TEXT_QKV, "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
}  # fmt: skip
BLOCKS = {  # family -> diffusers' list of blocks -> the publisher's, and what is in one
    "flux": {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE), "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    },
    "sd3": {"transformer_blocks": ("joint_blocks", SD3_JOINT)},
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """A layer's LoRA, its alpha / rank in ``up``: the weight grows by up @ down.  (R, in, ...), (out, R, ...)."""

    down: Tensor
    up: Tensor


def kohya_state(family: str, net: Any, lora: Mapping[str, Factors]) -> dict[str, Tensor]:
    """LoRAs by diffusers' names -> a file's tensors; ``net`` is the network, in diffusers' layout, that they are of.

    Raises UserError for a layer that these trainers have no name for.
    """
    wholes: dict[str, Parts] = {}
    for name in lora:
        whole, parts = _publishers(family, net, name)
        wholes[whole] = parts
    state: dict[str, Tensor] = {}
    for whole, parts in wholes.items():
        rows = [net.get_submodule(part).out_features for part in parts] if len(parts) > 1 else []
        factors = stacked([lora.get(part) for part in parts], rows) if rows else lora[parts[0]]
        key = "lora_unet_" + whole.replace(".", "_")
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = factors.down, factors.up
        state[f"{key}.alpha"] = torch.tensor(float(len(factors.down)))
    return state


def stacked(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    """One LoRA of a layer whose outputs are ``rows`` of each part, one after the other; None: that part has no LoRA."""
    given = [part for part in parts if part is not None]
    up = given[0].up.new_zeros(sum(rows), sum(len(part.down) for part in given))
    row = column = 0
    for part, height in zip(parts, rows, strict=True):
        if part is not None:
            width = len(part.down)
            up[row : row + height, column : column + width] = part.up
            column += width
        row += height
    return Factors(torch.cat([part.down for part in given]), up)


def _publishers(family: str, net: Any, name: str) -> tuple[str, Parts]:
    """Diffusers' name of a layer -> the publisher's name of the one that it is in, and the names of all that are."""
    if family in QWEN:
        return name, (name,)
    if family == "sdxl":
        found = _sgm(name, net.config)
        if found is not None:
            return found, (name,)
    else:
        block, _, rest = name.partition(".")
        number, _, layer = rest.partition(".")
        theirs, layers = BLOCKS[family].get(block, ("", {}))
        for whole, parts in layers.items():
            if layer in parts:
                return f"{theirs}.{number}.{whole}", tuple(f"{block}.{number}.{part}" for part in parts)
    raise UserError(
        f"{name}: kohya's trainers have no name for a LoRA of this layer",
        "choose other --lora-targets, or export --to merged",
    )


def _sgm(name: str, config: Any) -> str | None:
    """Diffusers' name of a layer of SDXL's UNet -> the published file's; None: it has none."""
    if name in SGM_TOP:
        return SGM_TOP[name]
    patterns: dict[str, Callable[[re.Match[str]], str]] = {
        r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)": lambda m: _down(m, config.layers_per_block),
        r"mid_block\.(\w+)\.(\d+)\.(.+)": _middle,
        r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)": lambda m: _up(m, config.layers_per_block),
    }
    for pattern, written in patterns.items():
        if match := re.fullmatch(pattern, name):
            return written(match)
    return None


def _inside(kind: str, rest: str) -> str:
    return SGM_RESNET[rest] if kind == "resnets" else rest


def _down(match: re.Match[str], layers: int) -> str:
    """Each block is ``layers`` of a resnet (0) and an attention (1), then the halving, after the first convolution."""
    block, kind, at, rest = int(match[1]), match[2], int(match[3]), match[4]
    first = 1 + block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.op"
    return f"input_blocks.{first + at}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _middle(match: re.Match[str]) -> str:
    kind, at, rest = match[1], int(match[2]), match[3]
    return f"middle_block.{1 if kind == 'attentions' else 2 * at}.{_inside(kind, rest)}"


def _up(match: re.Match[str], layers: int) -> str:
    """One layer more than on the way down; the doubling (2) is the last thing in the last of them."""
    block, kind, at, rest = int(match[1]), match[2], int(match[3]), match[4]
    first = block * (layers + 1)
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.2.{rest}"
    return f"output_blocks.{first + at}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
