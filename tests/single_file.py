"""A diffusers SDXL written into one file, in the names of the published single files: the way back of diffusers' reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def unet_key(key: str, layers: int, attends: list[bool]) -> str:
    """``attends``: of each block on the way up, whether it has attention."""
    for ours, theirs in TOP.items():
        key = re.sub(rf"^{re.escape(ours)}\.", theirs + ".", key)

    def down(m: re.Match) -> str:
        block, kind, at = int(m[1]), m[2], int(m[3])
        number = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else at)
        return f"input_blocks.{number}.{int(kind == 'attentions')}."

    def up(m: re.Match) -> str:
        block, kind, at = int(m[1]), m[2], int(m[3])
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.{1 + attends[block]}."
        return f"output_blocks.{block * (layers + 1) + at}.{int(kind == 'attentions')}."

    key = re.sub(r"^down_blocks\.(\d+)\.(\w+)\.(\d+)\.", down, key)
    key = re.sub(r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op.", key)
    key = re.sub(r"^up_blocks\.(\d+)\.(\w+)\.(\d+)\.", up, key)
    if "transformer_blocks" not in key:
        for ours, theirs in RESNET.items():
            key = re.sub(rf"(\d)\.{ours}\.", rf"\1.{theirs}.", key)
    return "model.diffusion_model." + key


def vae_entry(key: str, value: Tensor, blocks: int) -> tuple[str, Tensor]:
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        key = key.replace("to_out.0", "proj_out")
        key = re.sub(r"to_([qkv])\.", r"\1.", key)
        value = value[..., None, None] if value.ndim == 2 else value
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return "first_stage_model." + key, value


def open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second text encoder: q, k and v in one matrix, the projection transposed."""
    out = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        **{f"ln_final.{kind}": state[f"text_model.final_layer_norm.{kind}"] for kind in ("weight", "bias")},
    }
    for key, value in state.items():
        if not (match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key)):
            continue
        block = f"transformer.resblocks.{match[1]}."
        if match[2] in OPEN_CLIP:
            out[f"{block}{OPEN_CLIP[match[2]]}.{match[3]}"] = value
        elif match[2] == "self_attn.q_proj":
            parts = [state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            out[f"{block}attn.in_proj_{match[3]}"] = torch.cat(parts)
    return {"conditioner.embedders.1.model." + key: value for key, value in out.items()}


def save_single_file(pipe: Any, path: Path) -> Path:
    layers = pipe.unet.config.layers_per_block
    attends = ["CrossAttn" in name for name in pipe.unet.config.up_block_types]
    state = {unet_key(key, layers, attends): value for key, value in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    state |= dict(vae_entry(key, value, blocks) for key, value in pipe.vae.state_dict().items())
    first = {key.removeprefix("text_model."): value for key, value in pipe.text_encoder.state_dict().items()}
    state |= {f"conditioner.embedders.0.transformer.text_model.{key}": value for key, value in first.items()}
    state |= open_clip_state(pipe.text_encoder_2.state_dict())
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path
