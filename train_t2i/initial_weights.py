"""What a generator starts from beside its teacher's weights: a few-step LoRA, other weights, or a run's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import rewards
from rewards.weights import file_kind, read_state
from train_t2i.checkpoint import RECORDS, run_of
from train_t2i.errors import UserError
from train_t2i.families import Family

TAKES = "a LoRA, a folder of the pipeline or of its denoiser, a state dict or a run's step-N.pt"


def load_generator_weights(family: Family, net: Any, source: str, part: str) -> None:
    """Put ``source`` (``TAKES``; a LoRA is fused) into a generator; ``part`` of a run's checkpoint is its generator.

    Raises UserError.
    """
    state = _state_of(Path(source), family.denoiser_name, part)
    if any(".lora" in key or "lora_" in key for key in state):
        _fuse_lora(family, net, state, source)
        return
    parameters = {name for name, _ in net.named_parameters()}
    # a run's checkpoint has no buffers, such as SD3's table of positions: those of the model stay
    buffers = {name: tensor for name, tensor in net.state_dict().items() if name not in parameters}
    try:
        net.load_state_dict(buffers | state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: not weights of this generator ({first})", "give weights of the same model"
        ) from None


def record_of_start(source: str) -> dict[str, Any] | None:
    """What a run's checkpoint says that ``source`` is (its ``step-N.pt``) or is an export of (``lora_gen/step-N``).

    None: it is of no run, or the record cannot be read; of an export its weights are all that is needed.
    """
    path = Path(source).absolute()
    record = path if path.suffix == ".pt" else path.parent.parent / RECORDS / f"{path.name}.pt"
    if record.parent.name != RECORDS or not record.is_file():
        return None
    try:
        return run_of(record).load(record, [])[1]
    except UserError:
        return None


def check_whole(source: str) -> None:
    """Raises UserError where ``source`` is the LoRA of a run that trained it on more than its teacher's weights."""
    settings = (record_of_start(source) or {}).get("settings", {})
    below = settings.get("generator_init") or settings.get("xl_ode_pretrain_path")
    if below and settings["use_lora_gen"]:
        raise UserError(
            f"{source}: this LoRA lies on {below}, which would be left out",
            "export its run with --to merged, and give that folder",
        )


def _state_of(path: Path, denoiser: str, part: str) -> dict[str, Tensor]:
    if path.suffix == ".pt" and path.parent.name == RECORDS:
        parts, record = run_of(path).load(path, [part])
        if record["settings"]["use_lora_gen"]:
            raise UserError(f"{path}: its generator is a LoRA", "give its export, or continue it with --resume-ckpt")
        return dict(parts[part].tensors["model"])
    if (path / "adapter_config.json").is_file():
        return _peft_adapter(path, denoiser)
    return {key: tensor for file in _files_of(path, denoiser) for key, tensor in _read(file).items()}


def _files_of(path: Path, denoiser: str) -> list[Path]:
    """The file, or those of a folder; of a pipeline's folder those of its denoiser."""
    if not path.is_dir():
        return [path]
    folder = path / denoiser if (path / denoiser).is_dir() else path
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"{path}: holds no weights", f"give {TAKES}")
    return files


def _peft_adapter(folder: Path, denoiser: str) -> dict[str, Tensor]:
    """An adapter as peft saves it (a run's ``lora_gen/step-N``) in diffusers' names, its factor folded into B."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        factor = config["lora_alpha"] / config["r"]
        plain = not (config.get("use_rslora") or config.get("use_dora"))
        plain = plain and not (config.get("rank_pattern") or config.get("alpha_pattern"))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}: its adapter_config.json cannot be used ({error})", "save the adapter again"
        ) from None
    if not plain:
        raise UserError(
            f"{folder}: only plain LoRA of one rank is understood", "merge it into the model's weights first"
        )
    state = _read(folder / "adapter_model.safetensors")
    named = {f"{denoiser}." + key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    return {key: tensor * factor if ".lora_B." in key else tensor for key, tensor in named.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_state(path)
    except rewards.RewardError as error:
        raise UserError(str(error)) from None


def _fuse_lora(family: Family, net: Any, state: dict[str, Tensor], source: str) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    name = family.denoiser_name
    try:
        lora, alphas = family.lora_state(state, net)
        settings = _lora_settings(_files_of(Path(source), name))
        net.load_lora_adapter(lora, network_alphas=alphas, prefix=name, adapter_name="init", metadata=settings)
    except Exception as error:  # converters raise whatever a foreign file makes them
        raise UserError(f"{source}: not a LoRA of this generator ({' '.join(str(error).split())[:200]})") from None
    net.fuse_lora()
    net.unload_lora()
    if all(torch.equal(before[key], value) for key, value in net.state_dict().items()):
        raise UserError(f"{source}: this LoRA changes nothing", "it names no layer of this model")


def _lora_settings(files: Sequence[Path]) -> dict[str, Any] | None:
    """What diffusers writes into a LoRA's header: its ranks and alphas.  None: there is nothing, alpha is the rank."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    found: dict[str, Any] = {}
    for file in files:
        if file_kind(file) == "safetensors":
            with safe_open(file, framework="pt") as opened:
                found |= json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return found or None
