"""A generator's whole weights: in the folder of a pipeline, or alone beside the scheduler that they are sampled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from train_t2i.export.folders import seal
from train_t2i.export.policy import own_layers, write_policy_code
from train_t2i.export.recipe import Recipe
from train_t2i.student import ImageModel


def merge_adapters(net: nn.Module) -> nn.Module:
    """Fold every LoRA into the layer it sits on, in the layer's own (fp32) format, and put the plain layers back."""
    for layer in [module for module in net.modules() if isinstance(module, LoraLayer)]:
        layer.merge(safe_merge=True, adapter_names=list(layer.lora_A) or None)
    return without_adapters(net)


def without_adapters(net: nn.Module) -> nn.Module:
    """Put the plain layers back in the place of those that have a LoRA."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, layer.get_base_layer())
    return net


def stock_pipeline(model: ImageModel, recipe: Recipe, dtype: torch.dtype) -> Any:
    """The model's own pipeline with the generator in it."""
    if model.settings.run.method == "arcflow":
        own_layers(model)
    pipe: Any = model.family.pipeline(merge_adapters(model.network), recipe.scheduler, model.latent_shape[1:])
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def write_pipeline(model: ImageModel, recipe: Recipe, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """All parts of the pipeline; ``DiffusionPipeline.from_pretrained`` loads it."""
    pipe = stock_pipeline(model, recipe, dtype)
    pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    finish(model, recipe, pipe, folder)


def write_merged(model: ImageModel, recipe: Recipe, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Of that folder the denoiser and the scheduler: what a student has of its own."""
    pipe = stock_pipeline(model, recipe, dtype)
    name = model.family.denoiser_name
    getattr(pipe, name).save_pretrained(folder / name, max_shard_size=max_shard_size)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    finish(model, recipe, pipe, folder)


def finish(model: ImageModel, recipe: Recipe, pipe: Any, folder: Path) -> None:
    name = model.family.denoiser_name
    seal(getattr(pipe, name), folder / name, recipe.header)
    if model.settings.run.method == "arcflow":
        write_policy_code(type(pipe), folder)
