"""What accelerate's launcher asks for by its environment: which backend, and FSDP's and DeepSpeed's own settings.

A setting is taken, or it does nothing here and is told, or it is refused by name with the way out: what a run's own flags say
holds, and nothing else is trained in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_t2i.errors import UserError

Environ = Mapping[str, str]
STAGES = (2, 3)


@dataclass(frozen=True)
class Flags:
    """What a run's own flags say of things that a launcher can say too."""

    mixed_precision: str = "no"
    max_grad_norm: float = 1.0
    batch_size: int = 1
    accumulate: int = 1


@dataclass(frozen=True)
class Asked:
    backend: str  # ddp, fsdp2, zero2 or zero3
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # what is taken of a DeepSpeed file
    blocks: tuple[str, ...] = ()  # classes that --fsdp_transformer_layer_cls_to_wrap names
    told: tuple[str, ...] = ()


def asked(backend: str, flags: Flags, world: int, environ: Environ) -> Asked:
    """``backend``: the flag, of which ``auto`` is what the launcher says.  Raises UserError."""
    if _on(environ, "ACCELERATE_USE_FSDP") and backend in ("auto", "fsdp2"):
        return _fsdp(environ)
    if _on(environ, "ACCELERATE_USE_DEEPSPEED") and backend in ("auto", "zero2", "zero3"):
        return _deepspeed(backend, flags, world, environ)
    return Asked("ddp" if backend == "auto" else backend)


def _on(environ: Environ, name: str) -> bool:
    return environ.get(name, "").lower() == "true"


# -- FSDP ------------------------------------------------------------------------------------------------------------

# flag of accelerate's launcher -> the values that are taken, and the way out; none given is taken too
FSDP_TAKEN: dict[str, tuple[tuple[str, ...], str]] = {
    "sharding_strategy": (
        ("FULL_SHARD", "1"),
        "take FULL_SHARD, or --use_deepspeed --zero_stage 2 (weights whole), or no --use_fsdp (all whole)",
    ),
    "reshard_after_forward": (("TRUE", "FULL_SHARD"), "take true: weights are given up after a block"),
    "offload_params": (
        ("FALSE",),
        "leave it out: take more processes, --gradient-checkpointing or --offload-optimizer",
    ),
    "auto_wrap_policy": (("TRANSFORMER_BASED_WRAP",), "leave it out: the units are the model's blocks"),
    "backward_prefetch": (("BACKWARD_PRE",), "take BACKWARD_PRE, which is what fully_shard does"),
    "forward_prefetch": (("FALSE",), "leave it out"),
    "activation_checkpointing": (("FALSE",), "leave it out, and give the trainer --gradient-checkpointing"),
    "activation_checkpointing_offload": (("FALSE",), "leave it out"),
    "ignored_modules": ((), "leave it out"),
}


def _fsdp(environ: Environ) -> Asked:
    for name, (taken, way_out) in FSDP_TAKEN.items():
        value = environ.get(f"FSDP_{name.upper()}")
        if value is not None and value.upper() not in taken:
            raise UserError(f"--fsdp_{name} {value} is not taken here", way_out)
    told = []
    if environ.get("FSDP_VERSION") == "1":
        told.append("FSDP 1 is asked for: torch's fully_shard (FSDP 2) shares out the same")
    if form := environ.get("FSDP_STATE_DICT_TYPE"):
        told.append(f"--fsdp_state_dict_type {form}: checkpoints have one form, whole tensors, on every backend")
    blocks = environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return Asked("fsdp2", blocks=tuple(name.strip() for name in blocks if name.strip()), told=tuple(told))


def check_blocks(named: Sequence[str], blocks: Sequence[str]) -> None:
    """Raises UserError for a class to wrap that is not one of a network's ``blocks``, which are the units in any case."""
    if strange := [name for name in named if name not in blocks]:
        raise UserError(
            f"--fsdp_transformer_layer_cls_to_wrap {','.join(strange)}: not a block of this model",
            f"its blocks are {','.join(blocks)}: leave it out, they are the units anyway",
        )


# -- DeepSpeed -------------------------------------------------------------------------------------------------------

DS_TAKEN = (
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
)  # fmt: skip
DS_ZERO_TAKEN = (
    "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
)  # fmt: skip
# without meaning here: how DeepSpeed's own checkpoints are written and read, and what the trainer sets for its optimizer
DS_DROPPED = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
DS_ZERO_DROPPED = (
    "stage", "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "load_from_fp32_weights", "elastic_checkpoint",
)  # fmt: skip
DS_REPLACED = {"optimizer": "the --adam flags and --use-8bit-adam", "scheduler": "--lr-scheduler"}
NO_OFFLOADING = "take it out, or take fsdp2, and the trainer's --offload-optimizer"
PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}


def _deepspeed(backend: str, flags: Flags, world: int, environ: Environ) -> Asked:
    _same("--gradient_clipping", environ.get("ACCELERATE_GRADIENT_CLIPPING"), "--max-grad-norm", flags.max_grad_norm)
    _same(
        "--gradient_accumulation_steps", environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        "the trainer's --gradient-accumulation-steps", flags.accumulate,
    )  # fmt: skip
    for name in ("optimizer", "param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", "none")
        if device != "none":
            raise UserError(f"--offload_{name}_device {device} is not taken here", NO_OFFLOADING)
    file, stage = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"), environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    content = read_file(file) if file and file != "none" else {}
    taken, told = from_file(str(file), content, flags, world)
    written = content.get("zero_optimization", {}).get("stage", "auto")
    if stage is not None and written not in ("auto", int(stage)):
        raise UserError(f"--zero_stage {stage}, but {file} has stage {written}", "leave --zero_stage out")
    found = int(stage or 2) if written == "auto" else written
    if found not in STAGES:
        raise UserError(f"this launch asks for DeepSpeed with ZeRO stage {found}", "use stage 2 or 3, or no DeepSpeed")
    if backend not in ("auto", f"zero{found}"):
        raise UserError(f"--backend {backend}, but this launch asks for ZeRO stage {found}", "leave --backend out")
    return Asked(f"zero{found}", taken, told=tuple(told))


def _same(theirs: str, value: Any, ours: str, own: float) -> None:
    """Raises UserError where a launcher's number, which may be left open, is not the run's."""
    if value in (None, "auto", "none"):
        return
    try:
        same = float(value) == own
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError(f"{theirs} {value}, but {ours} {own:g}", f'leave it out (in a file: "auto"), or set {ours}')


def read_file(file: str) -> dict[str, Any]:
    """A DeepSpeed file.  Raises UserError."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--deepspeed_config_file {file}: no such file", "e.g. config/zero_stage2_config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed_config_file {file}: cannot be read ({error})", "write JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise UserError(f"--deepspeed_config_file {file}: not DeepSpeed's settings", "write a JSON object")
    return content


def from_file(file: str, content: Mapping[str, Any], flags: Flags, world: int) -> tuple[dict[str, Any], list[str]]:
    """(what goes to DeepSpeed beside the trainer's own settings, lines to tell).  Raises UserError."""
    numbers = {
        "gradient_clipping": ("--max-grad-norm", flags.max_grad_norm),
        "train_micro_batch_size_per_gpu": ("--batch-size", flags.batch_size),
        "gradient_accumulation_steps": ("--gradient-accumulation-steps", flags.accumulate),
        "train_batch_size": ("the global batch of", flags.batch_size * flags.accumulate * world),
    }
    taken: dict[str, Any] = {}
    told: list[str] = []
    for name, value in content.items():
        if name in numbers:
            _same(f"{file}: {name}", value, *numbers[name])
        elif name in PRECISIONS:
            told += _precision(file, name, value, flags.mixed_precision)
        elif name in DS_REPLACED:
            raise UserError(f'{file}: "{name}" is not taken here', f"take it out: {DS_REPLACED[name]} decide")
        elif name in DS_TAKEN:
            taken |= {} if value == "auto" else {name: value}
        elif name not in (*DS_DROPPED, "zero_optimization"):
            raise UserError(f'{file}: "{name}" is not taken here', "take it out")
    zero = _zero(file, content.get("zero_optimization", {}))
    return taken | ({"zero_optimization": zero} if zero else {}), told


def _precision(file: str, name: str, section: Any, mixed_precision: str) -> list[str]:
    enabled = section.get("enabled", False) if isinstance(section, dict) else section
    if enabled in (False, "auto"):
        return []
    if enabled is not True or PRECISIONS[name] != mixed_precision:
        raise UserError(
            f'{file}: "{name}" is enabled, but --mixed-precision {mixed_precision}',
            f'write "enabled": "auto" there, or set --mixed-precision {PRECISIONS[name]}',
        )
    return [f'{file}: "{name}" is --mixed-precision {mixed_precision}: weights and their updates stay fp32']


def _zero(file: str, section: Mapping[str, Any]) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for name, value in section.items():
        if name in ("offload_optimizer", "offload_param"):
            device = value.get("device", "none") if isinstance(value, dict) else value
            if device not in ("none", "auto", None):
                raise UserError(f"{file}: {name} to {device} is not taken here", NO_OFFLOADING)
        elif name in DS_ZERO_TAKEN:
            taken |= {} if value == "auto" else {name: value}
        elif name not in DS_ZERO_DROPPED:
            raise UserError(f'{file}: zero_optimization "{name}" is not taken here', "take it out")
    return taken
