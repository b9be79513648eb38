"""A run's LoRA in one file: diffusers, ComfyUI and kohya's tools add the same to every weight.

The factor alpha / rank stands in B, and alpha is the rank wherever it is told, so that those who look for an alpha and those
who do not agree.  ``lora``: SDXL's file has kohya's names, which all three read (ComfyUI knows SDXL's attention by no name of
diffusers'); those of the transformers have diffusers' (``transformer.``), which ComfyUI reads too.  ``kohya``: kohya's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from train_t2i.config import Config
from train_t2i.errors import UserError
from train_t2i.export.denoiser import without_adapters
from train_t2i.export.folders import stamp
from train_t2i.export.kohya import NETWORK_MODULES, Factors, kohya_state
from train_t2i.export.recipe import Recipe, header_of
from train_t2i.student import ImageModel

ADAPTER = "generator"
READ_BACK = "read_back"  # what the written file is loaded as


def write_lora(model: ImageModel, recipe: Recipe, folder: Path, dtype: torch.dtype) -> None:
    """The file that ``load_lora_weights(folder)`` finds, and the scheduler; diffusers has loaded it before it counts."""
    lora = take_lora(model, dtype)
    if model.settings.run.model_family == "sdxl":
        write_kohya_file(model, recipe, folder, lora)
    else:
        prefix = model.family.denoiser_name
        state = {f"{prefix}.{name}.lora_A.weight": factors.down for name, factors in lora.items()}
        state |= {f"{prefix}.{name}.lora_B.weight": factors.up for name, factors in lora.items()}
        rank = rank_of(lora)
        told = {"r": rank, "lora_alpha": rank, "target_modules": sorted(lora)}
        said = {LORA_ADAPTER_METADATA_KEY: {f"{prefix}.{key}": value for key, value in told.items()}}
        write_file(state, folder, recipe, said)
    check_loaded(model, recipe, folder, lora)


def write_kohya(model: ImageModel, recipe: Recipe, folder: Path, dtype: torch.dtype) -> None:
    """The same under the names of kohya's trainers."""
    write_kohya_file(model, recipe, folder, take_lora(model, dtype))


def write_kohya_file(model: ImageModel, recipe: Recipe, folder: Path, lora: dict[str, Factors]) -> None:
    name = model.settings.run.model_family
    rank = rank_of(lora)
    said = {"ss_network_module": NETWORK_MODULES[name], "ss_network_dim": rank, "ss_network_alpha": rank}
    write_file(kohya_state(name, model.network, lora), folder, recipe, said)


def write_file(state: dict[str, Tensor], folder: Path, recipe: Recipe, said: dict[str, Any]) -> None:
    file = folder / LORA_WEIGHT_NAME_SAFE
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, metadata={"format": "pt"})
    stamp(file, recipe.header | header_of(said))
    recipe.scheduler.save_pretrained(folder / "scheduler")


def rank_of(lora: dict[str, Factors]) -> int:
    return len(next(iter(lora.values())).down)


def check_alone(run: Config) -> None:
    """Raises UserError where the generator is more than the base and a LoRA."""
    whole = "export --to merged or --to pipeline"
    if not run.use_lora_gen:
        raise UserError("this run trained its generator's own weights: it has no LoRA", whole)
    if run.method == "arcflow":
        raise UserError("an ArcFlow generator has layers of its own, which no LoRA file holds", whole)
    if start := run.generator_init or run.xl_ode_pretrain_path:
        raise UserError(f"this run's LoRA lies on {start}, and is nothing on the base model alone", whole)


def take_lora(model: ImageModel, dtype: torch.dtype) -> dict[str, Factors]:
    """The generator's LoRA by diffusers' names of the layers; the network is then the plain base.  Raises UserError."""
    check_alone(model.settings.run)
    lora = {}
    for name, layer in lora_layers(model.network).items():
        up = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
        lora[name] = Factors(layer.lora_A[ADAPTER].weight.detach().to(dtype), up.to(dtype))
    net: Any = without_adapters(model.network)
    del net.peft_config
    return lora


def lora_layers(net: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, LoraLayer)}


def check_loaded(model: ImageModel, recipe: Recipe, folder: Path, lora: dict[str, Factors]) -> None:
    """Load the file into the base as anybody would.  Raises UserError unless each layer has what was trained: diffusers
    itself goes on with a warning where names fit nothing."""
    pipe: Any = model.family.pipeline(model.network, recipe.scheduler, model.latent_shape[1:])
    with only_errors():
        pipe.load_lora_weights(folder, adapter_name=READ_BACK)
    found = lora_layers(model.network)
    right = [name for name in found.keys() & lora.keys() if _holds(found[name], lora[name])]
    if not lora or len(right) < len(found.keys() | lora.keys()):
        raise UserError(
            f"stock diffusers loads {len(right)} of the {len(lora)} layers of this LoRA as they were trained",
            "export --to merged, and report this with the versions of diffusers and peft",
        )


@contextmanager
def only_errors() -> Iterator[None]:
    """diffusers warns of every text encoder that a LoRA file has nothing for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _holds(layer: Any, factors: Factors) -> bool:
    down, up = layer.lora_A[READ_BACK].weight, layer.lora_B[READ_BACK].weight
    same = torch.equal(down.float(), factors.down.float()) and torch.equal(up.float(), factors.up.float())
    return same and layer.scaling[READ_BACK] == 1
