"""How ComfyUI and kohya's trainers put a LoRA onto a model in its publisher's layout, restated from their documented rules.

Both: W + (alpha / rank) * up @ down, alpha the rank where none is told (ComfyUI ``weight_adapter/lora.py``, sd-scripts
``networks/lora.py``).  ComfyUI names a layer ``lora_unet_`` with the publisher's name, or ``transformer.`` with diffusers', which then
is some rows of the publisher's (``comfy/utils.py``: flux_to_diffusers, mmdit_to_diffusers).
"""

from __future__ import annotations

from typing import Any

import torch
from single_file import unet_key
from torch import Tensor

Rows = tuple[str, int]  # publisher's name of a weight, and the row of it where diffusers' begins
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FLUX_DOUBLE = {
    "attn.to_out.0": "img_attn.proj", "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
SD3_JOINT = {
    "attn.to_add_out": "context_block.attn.proj", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2", "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
}  # fmt: skip


def fused(names: tuple[str, ...], whole: str, width: int) -> dict[str, Rows]:
    return {name: (whole, i * width) for i, name in enumerate(names)}


def publisher(family: str, net: Any) -> dict[str, Rows]:
    """Diffusers' name of a layer -> where its weight stands in the publisher's layout."""
    if family == "qwen_image":
        return {name: (name, 0) for name, _ in net.named_modules()}
    if family == "sdxl":
        attends = ["CrossAttn" in name for name in net.config.up_block_types]
        prefix = len("model.diffusion_model.")
        return {
            name: (unet_key(f"{name}.weight", net.config.layers_per_block, attends)[prefix : -len(".weight")], 0)
            for name, _ in net.named_modules()
        }
    width = net.config.num_attention_heads * net.config.attention_head_dim
    double = {name: (whole, 0) for name, whole in (FLUX_DOUBLE if family == "flux" else SD3_JOINT).items()}
    if family == "flux":
        double |= fused(QKV, "img_attn.qkv", width) | fused(TEXT_QKV, "txt_attn.qkv", width)
        single = {name: (whole, 0) for name, whole in FLUX_SINGLE.items()}
        single |= fused((*QKV, "proj_mlp"), "linear1", width)
        lists = {
            "transformer_blocks": ("double_blocks", double),
            "single_transformer_blocks": ("single_blocks", single),
        }
    else:
        second = tuple(name.replace("attn.", "attn2.") for name in QKV)
        double |= fused(QKV, "x_block.attn.qkv", width) | fused(second, "x_block.attn2.qkv", width)
        double |= fused(TEXT_QKV, "context_block.attn.qkv", width)
        lists = {"transformer_blocks": ("joint_blocks", double)}
    return {
        f"{block}.{i}.{name}": (f"{theirs}.{i}.{whole}", row)
        for block, (theirs, layers) in lists.items()
        for i in range(len(getattr(net, block)))
        for name, (whole, row) in layers.items()
    }  # fmt: skip


def weights(net: Any, places: dict[str, Rows]) -> dict[str, Tensor]:
    """The weights of ``net`` that have a place, in the publisher's layout."""
    layers = dict(net.named_modules())
    made: dict[str, dict[int, Tensor]] = {}
    for name, (whole, row) in places.items():
        if name in layers and isinstance(getattr(layers[name], "weight", None), Tensor):
            made.setdefault(whole, {})[row] = layers[name].weight.detach()
    return {whole: torch.cat([rows[row] for row in sorted(rows)]) for whole, rows in made.items()}


def applied(base: dict[str, Tensor], places: dict[str, Rows], file: dict[str, Tensor]) -> dict[str, Tensor]:
    """``base`` with every LoRA of ``file``.  A key that means nothing is an error here; both programs only warn."""
    by_flat = {"lora_unet_" + name.replace(".", "_"): name for name in base}
    result = {name: weight.clone() for name, weight in base.items()}
    left = dict(file)
    for key in [key for key in file if key.endswith((".lora_down.weight", ".lora_A.weight"))]:
        stem = key.rsplit(".", 2)[0]
        down = left.pop(key)
        up = left.pop(stem + (".lora_up.weight" if "lora_down" in key else ".lora_B.weight"))
        alpha = left.pop(f"{stem}.alpha", None)
        whole, row = (by_flat[stem], 0) if stem in by_flat else places[stem.removeprefix("transformer.")]
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        rows = result[whole][row : row + len(up)]
        assert stem not in by_flat or len(up) == len(result[whole])
        rows += scale * (up.flatten(1) @ down.flatten(1)).reshape(rows.shape)
    assert not left
    return result
