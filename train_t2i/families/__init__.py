"""Model families by name, and the look that tells which one a folder holds."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import diffusers
import transformers

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, Family, FamilyOptions, Source
from train_t2i.families.flux import FLUX
from train_t2i.families.loading import told
from train_t2i.families.qwen_image import QwenImage
from train_t2i.families.qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from train_t2i.families.sd3 import SD3
from train_t2i.families.sdxl import SDXL

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

FAMILIES: dict[str, Any] = {
    "sdxl": SDXL, "sd3": SD3, "flux": FLUX, "qwen_image": QwenImage, "qwen_image_edit": QwenImageEdit,
    "qwen_image_edit_plus": QwenImageEditPlus,
}  # fmt: skip

PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
}

__all__ = ["FAMILIES", "Cond", "Family", "FamilyOptions", "Source", "family_of", "load_family"]


def family_of(model: str) -> str:
    """The family name of a model, from its ``model_index.json``; a single file is SDXL's."""
    path = FilePath(model)
    if path.is_file():
        return "sdxl"
    if not path.is_dir():
        with told(model, "--pretrained-model"):
            name = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        return _known(name, f"{model}: model_index.json")
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"--pretrained-model {model}: not a diffusers pipeline folder (no model_index.json)",
            "give the folder that holds model_index.json, the denoiser, vae/ and the text encoders",
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a pipeline index ({error})", "download the model again") from None
    return _known(name, str(index))


def _known(name: str, index: str) -> str:
    if name not in PIPELINES:
        raise UserError(f"{index}: {name} is not supported", f"known pipelines: {', '.join(sorted(PIPELINES))}")
    return PIPELINES[name]


def load_family(name: str, model: str, **options: Any) -> Family:
    """Build the family ``name`` ("auto" looks at the model) on ``model``; ``options`` as in FamilyOptions."""
    return FAMILIES[family_of(model) if name == "auto" else name].from_pretrained(model, FamilyOptions(**options))
