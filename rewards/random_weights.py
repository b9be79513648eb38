"""Weights of every reward with random values, in the published layouts: for benchmarks and tests without a download.

``small`` has the architecture in a few megabytes; otherwise it has the published shapes.  Values are a function of the
tensor's name alone, so that the same weights can be made again elsewhere.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from rewards import REWARDS, blip
from rewards.aesthetic import VIT_L_14
from rewards.head import regression_head
from rewards.tower import VIT_H_14
from rewards.tower_config import BPE_VOCABULARY

SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": BPE_VOCABULARY, "width": 16, "heads": 2, "layers": 2},
}
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'!"
# image_size_px, patch_px, vision width, layers, mlp; text width, layers, mlp; words of the vocabulary without two marks
BLIP_SMALL, BLIP_LARGE = (32, 8, 128, 2, 256, 64, 2, 96, 200), (224, 16, 1024, 24, 4096, 768, 12, 3072, 30522)


def write(name: str, folder: Path, *, small: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a reward's random weights into ``folder`` and returns what the reward is built from."""
    if name not in REWARDS:
        raise KeyError(name)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "imagereward":
        return write_imagereward(folder, small=small, dtype=dtype)
    if name in ("pickscore", "aesthetic"):
        model_cfg = SMALL if small else {"pickscore": VIT_H_14, "aesthetic": VIT_L_14}[name]
        write_transformers(folder, model_cfg, "quick_gelu" if name == "aesthetic" else "gelu", dtype)
        if name == "aesthetic":
            with torch.device("meta"):
                head = regression_head(model_cfg["embed_dim"])
            torch.save(filled(head.state_dict()), folder / "sac+logos+ava1-l14-linearMSE.pth")
        return folder
    with torch.device("meta"):
        state = CLIP(**(SMALL if small else VIT_H_14)).state_dict()
    config = {
        "model_cfg": (SMALL if small else VIT_H_14) | {"quick_gelu": name == "clip"},
        "preprocess_cfg": {"resize_mode": {"clip": "squash", "hpsv2": "longest"}[name]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(filled(state, dtype), folder / "open_clip_model.safetensors")
    return folder


def write_transformers(folder: Path, model_cfg: Mapping[str, Any], activation: str, dtype: torch.dtype) -> None:
    """A CLIPModel of open_clip's sizes, as ``config.json`` and ``model.safetensors``."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    common = {"hidden_act": activation, "projection_dim": model_cfg["embed_dim"]}
    config = CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config=common | {
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "patch_size": vision["patch_size"],
            "num_hidden_layers": vision["layers"], "image_size": vision["image_size"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        },
        text_config=common | {
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "vocab_size": text["vocab_size"],
            "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": BPE_VOCABULARY - 2, "eos_token_id": BPE_VOCABULARY - 1, "pad_token_id": BPE_VOCABULARY - 1,
        },
    )  # fmt: skip
    with torch.device("meta"):
        state = CLIPModel(config).state_dict()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(filled(state, dtype), folder / "model.safetensors")


def write_imagereward(folder: Path, *, small: bool, dtype: torch.dtype = torch.float32) -> Path:
    """``ImageReward.pt`` under its authors' names, and a vocabulary."""
    size_px, patch_px, width, layers, mlp, text_width, text_layers, text_mlp, words = (
        BLIP_SMALL if small else BLIP_LARGE
    )
    text = {
        "vocab_size": words + 2, "hidden_size": text_width, "encoder_hidden_size": width, "num_hidden_layers": text_layers,
        "num_attention_heads": text_width // blip.HEAD_WIDTH, "intermediate_size": text_mlp, "max_position_embeddings": 512,
        **blip.MED,
    }  # fmt: skip
    path = folder / "ImageReward.pt"
    source = blip.Source(path, folder / blip.VOCABULARY, size_px, patch_px, width, layers, mlp, tuple(text.items()))
    state = {authors_name(name): tensor for name, tensor in blip.empty(source).state_dict().items()}
    source.vocabulary.write_text("\n".join(vocabulary(words)) + "\n")
    torch.save(filled(state, dtype), path)
    return path


def authors_name(name: str) -> str:
    """A name of ``Blip`` -> of ImageReward.pt."""
    part, rest = name.split(".", 1)
    if part != "vision":
        return {"text": "blip.text_encoder.", "head": "mlp."}[part] + rest
    whole = {inner: authors for authors, inner in blip.VISION_NAMES.items()}
    for authors, inner in blip.LAYER_NAMES.items():
        rest = rest.replace(f".{inner}.", f".{authors}.")
    return "blip.visual_encoder." + whole.get(rest, rest.replace("encoder.layers.", "blocks."))


def vocabulary(count: int) -> Iterable[str]:
    """``count`` words that spell any text of small letters."""
    words = [*MARKS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return [*words, *(f"[unused{i}]" for i in range(count - len(words)))]


def filled(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values for every tensor, away from initial ones and zeros, so that each of them shows in a score."""
    return {name: _values(name, tensor, dtype) for name, tensor in state.items()}


def _values(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if not tensor.is_floating_point():  # position_ids
        return torch.arange(tensor.numel()).reshape(tensor.shape)
    if name == "logit_scale":
        return torch.tensor(math.log(100.0), dtype=dtype)
    noise = torch.empty(tensor.shape, dtype=dtype).normal_(generator=generator)
    if tensor.ndim < 2:
        norm = name.endswith("weight")
        return noise.mul_(0.1).add_(1.0 if norm else 0.0)
    return noise.mul_(tensor[0].numel() ** -0.5)
