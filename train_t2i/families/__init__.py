"""Model families by name, and the look that tells which one a folder holds.

Importing this loads no model library: a family's own file, and its pipeline with it, is imported when it is asked for.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path as FilePath
from typing import Any

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, Family, FamilyOptions, Source

FAMILIES = {  # name -> its file and class
    "sdxl": ("sdxl", "SDXL"),
    "sd3": ("sd3", "SD3"),
    "flux": ("flux", "FLUX"),
    "qwen_image": ("qwen_image", "QwenImage"),
    "qwen_image_edit": ("qwen_image_edit", "QwenImageEdit"),
    "qwen_image_edit_plus": ("qwen_image_edit", "QwenImageEditPlus"),
}

PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
}

__all__ = ["FAMILIES", "Cond", "Family", "FamilyOptions", "Source", "family_class", "family_of", "load_family"]


def family_class(name: str) -> Any:
    """The class of a family by its name."""
    file, kind = FAMILIES[name]
    return getattr(import_module(f"{__name__}.{file}"), kind)


def family_of(model: str) -> str:
    """The family name of a model, from its ``model_index.json``; a single file is SDXL's."""
    path = FilePath(model)
    if path.is_file():
        return "sdxl"
    if not path.is_dir():
        from diffusers import DiffusionPipeline

        from train_t2i.families.loading import told

        with told(model, "--pretrained-model"):
            name = DiffusionPipeline.load_config(model)["_class_name"]
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
    kind = family_class(family_of(model) if name == "auto" else name)
    return kind.from_pretrained(model, FamilyOptions(**options))
