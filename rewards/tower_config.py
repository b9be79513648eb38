"""What stands beside a tower's weights: ``open_clip_config.json``, or the ``config.json`` of transformers' CLIPModel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewards import hf_clip
from rewards.base import ResizeMode, RewardError
from rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess

CONFIG_NAME = "open_clip_config.json"
BPE_VOCABULARY = 49408  # tokens in the vocabulary that open_clip carries
# Settings that would make open_clip ask a hub, or build something other than a CLIP.
FOREIGN = ("custom_text", "multimodal_cfg", "hf_model_name", "hf_tokenizer_name", "timm_model_name")


def read_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file beside the weights and its ``model_cfg`` and ``preprocess_cfg``, with what can be built here checked.

    Raises RewardError.
    """
    path, other = folder / CONFIG_NAME, folder / hf_clip.CONFIG_NAME
    if not path.exists() and other.exists():
        return other, {"model_cfg": _with_whole_vocabulary(other, hf_clip.read_model_cfg(other))}
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RewardError(
            path, "there is no such file", "a folder needs it beside the weights, or name the file"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RewardError(path, f"cannot be read as JSON ({error})", "download it again") from None
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise RewardError(path, "has no model_cfg with embed_dim, vision_cfg, text_cfg", "use open_clip's layout")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise RewardError(path, "has a vision_cfg or text_cfg that is not an object", "use open_clip's layout")
    foreign = [key for part in (model_cfg, vision, text) for key in FOREIGN if part.get(key)]
    if foreign:
        raise RewardError(
            path, f"asks for {foreign[0]!r}", "only open_clip's own CLIP with its own tokenizer is built here"
        )
    _with_whole_vocabulary(path, model_cfg)
    return path, config


def _with_whole_vocabulary(path: Path, model_cfg: dict[str, Any]) -> dict[str, Any]:
    vocab_size = model_cfg["text_cfg"].get("vocab_size", BPE_VOCABULARY)
    if not isinstance(vocab_size, int) or vocab_size < BPE_VOCABULARY:
        reason = f"has vocab_size {vocab_size!r}, but the CLIP tokenizer gives ids up to {BPE_VOCABULARY - 1}"
        raise RewardError(path, reason, f"use a tower with the whole vocabulary of {BPE_VOCABULARY}")
    return model_cfg


def read_preprocess(path: Path, config: dict[str, Any], resize_mode: ResizeMode) -> Preprocess:
    """A folder's ``preprocess_cfg``; the size is the tower's own."""
    given = config.get("preprocess_cfg") or {}
    size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    try:
        height, width = (size, size) if isinstance(size, int) else size
        preprocess = Preprocess(
            size_px=(int(height), int(width)),
            resize_mode=given.get("resize_mode") or resize_mode,
            mean=_three(given.get("mean"), OPENAI_MEAN),
            std=_three(given.get("std"), OPENAI_STD),
            interpolation=given.get("interpolation") or "bicubic",
            fill=float(given.get("fill_color", 0)) / 255,
        )
        known = preprocess.resize_mode in ("squash", "longest", "shortest")
        if not known or preprocess.interpolation not in ("bicubic", "bilinear") or 0 in preprocess.std:
            raise ValueError("resize_mode is squash, longest or shortest; interpolation bicubic or bilinear; std not 0")
    except (AttributeError, TypeError, ValueError) as error:
        raise RewardError(path, f"has a preprocess_cfg or image_size out of order ({error})", "correct it") from None
    return preprocess


def _three(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """One number, or three, or nothing -> three numbers."""
    if not values:
        return default
    three = (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)
    if len(three) != 3:
        raise ValueError(f"mean and std have 3 values, not {len(three)}")
    return three
