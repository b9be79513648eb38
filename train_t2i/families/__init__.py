"""Model families by name, and the look that tells which one a folder holds."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import diffusers
import transformers

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, Family
from train_t2i.families.sdxl import SDXL

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

FAMILIES: dict[str, Any] = {"sdxl": SDXL}

PIPELINES = {"StableDiffusionXLPipeline": "sdxl"}

__all__ = ["FAMILIES", "Cond", "Family", "family_of", "load_family"]


def family_of(model: str) -> str:
    """The family name of a pipeline folder, from its ``model_index.json``; hub ids and single files are SDXL's so far."""
    folder = FilePath(model)
    if not folder.is_dir():
        return "sdxl"
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"--pretrained-model {model}: not a diffusers pipeline folder (no model_index.json)",
            "give the folder that holds model_index.json, unet/, vae/ and the text encoders",
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a pipeline index ({error})", "download the model again") from None
    if name not in PIPELINES:
        raise UserError(f"{index}: {name} is not supported", f"known pipelines: {', '.join(sorted(PIPELINES))}")
    return PIPELINES[name]


def load_family(name: str, model: str, **options: Any) -> Family:
    """Build the family ``name`` ("auto" looks at the model) on ``model``; options as its ``from_pretrained`` takes them."""
    return FAMILIES[family_of(model) if name == "auto" else name].from_pretrained(model, **options)
