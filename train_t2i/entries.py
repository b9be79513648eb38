"""Command lines of VideoX-Fun's Qwen-Image-Edit training in this toolkit's words: ``scripts/qwenimage/train_edit.py`` and
``scripts/zero_to_bf16.py`` are these tables and one call each.

Every flag that does something here is taken, with that script's own defaults; one that did nothing there is named and left out;
one that this toolkit does otherwise, or not, is refused with the way out.  Flags of ``python -m train_t2i train --method sft``
are taken too, and win.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train_t2i.cli import Parser, parse_bool, refuse_secrets, spelled
from train_t2i.config import EDIT_FAMILIES, fields_of
from train_t2i.errors import UserError

CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")

# theirs -> ours; one value
VALUES = {
    "pretrained_model_name_or_path": "pretrained_model",
    "transformer_path": "generator_init",
    "vae_path": "vae",
    "train_mode": "model_family",
    "train_data_dir": "train_data_dir",
    "train_data_meta": "data_path_train",
    "train_batch_size": "batch_size",
    "image_sample_size": "resolution",
    "dataloader_num_workers": "num_workers",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_train_epochs": "num_train_epochs",
    "max_train_steps": "max_train_steps",
    "checkpointing_steps": "checkpoint_steps",
    "checkpoints_total_limit": "checkpoints_total_limit",
    "learning_rate": "learning_rate_gen",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_weight_decay": "adam_weight_decay",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "mixed_precision": "mixed_precision",
    "seed": "seed",
    "vae_mini_batch": "vae_mini_batch",
    "weighting_scheme": "weighting_scheme",
    "logit_mean": "logit_mean",
    "logit_std": "logit_std",
    "mode_scale": "mode_scale",
    "validation_steps": "sample_steps",
    "report_to": "report_to",
}
# theirs -> ours and what it is set to
SWITCHES = {
    "gradient_checkpointing": ("gradient_checkpointing", "on"),
    "enable_bucket": ("enable_bucket", "on"),
    "random_hw_adapt": ("random_hw_adapt", "on"),
    "uniform_sampling": ("uniform_sampling", "on"),
    "use_8bit_adam": ("use_8bit_adam", "on"),
    "use_ema": ("ema_decay", "0.9999"),
}
# theirs -> ours; several values
LISTS = {
    "trainable_modules": "trainable_modules",
    "trainable_modules_low_learning_rate": "trainable_modules_low_learning_rate",
}
OWN = ("output_dir", "resume_from_checkpoint")  # translated by functions below
FIXED = {"train_sampling_steps": "1000"}  # theirs -> the only value that there is
# where neither side's flag is given: train_edit.py's defaults, but a batch of 1, the only one that it takes
DEFAULTS = {
    "batch_size": "1",
    "resolution": "512",
    "num_workers": "0",
    "learning_rate_gen": "1e-4",
    "lr_scheduler": "constant",
    "lr_warmup_steps": "500",
    "num_train_epochs": "100",
    "sample_steps": "0",
    # of the sample images, and of the call that an export recommends: the pipeline's own
    "teacher_num_steps": "50",
    "teacher_cfg": "4",
}
NOTHING_THERE = "did nothing in train_edit.py"
DEAD = {
    **dict.fromkeys(
        (
            "input_perturbation", "max_train_samples", "random_flip", "cache_dir", "prediction_type", "noise_offset",
            "snr_loss", "push_to_hub", "hub_model_id", "config_path", "tokenizer_max_length", "variant",
            "non_ema_revision", "revision", "enable_text_encoder_in_dataloader",
        ),
        NOTHING_THERE,
    ),
    "multi_stream": "gained nothing in train_edit.py, which waited for its stream at once",
    "local_rank": "is the launcher's",
    "use_deepspeed": "is read from accelerate's launch",
    "use_fsdp": "is read from accelerate's launch",
}  # fmt: skip
# theirs -> the way out
REFUSED = {
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN: flags are written down in many places",
    "low_vram": "leave it out: --gradient_checkpointing, --use_8bit_adam, --offload-optimizer and FSDP save memory",
    "random_ratio_crop": "leave it out: --enable_bucket keeps images whole",
    "fix_sample_size": "give --image_sample_size WIDTHxHEIGHT without --enable_bucket: images are cut to it, not distorted",
    "use_came": "leave it out: the optimizer is AdamW, or --use_8bit_adam",
    "scale_lr": "multiply --learning_rate by accumulation, batch and processes yourself",
    "initial_grad_norm_ratio": "leave it out: the limit is --max_grad_norm from the first step on",
    "abnormal_norm_clip_start": "leave it out: the limit is --max_grad_norm from the first step on",
    "allow_tf32": "leave it out: the network is called in --mixed_precision",
    "validation_epochs": "give --validation_steps",
    "validation_prompts": "leave it out: --validation_steps draws rows of the data, or those of --sample-prompts FILE",
    "validation_image_paths": "leave it out: --validation_steps draws rows of the data, or those of --sample-prompts FILE",
    "logging_dir": "leave it out: logs lie in --output_dir",
    "tracker_project_name": "leave it out: set WANDB_PROJECT",
    "report_model_info": "leave it out",
}


def make_parser() -> Parser:
    parser = Parser(prog="train_edit.py", description=__doc__, allow_abbrev=False)
    for name in (*VALUES, *OWN, *FIXED):
        parser.add_argument(spelled(f"--{name}", {}), dest=name)
    for name in SWITCHES:
        parser.add_argument(spelled(f"--{name}", {}), dest=name, nargs="?", const=True, type=parse_bool)
    for name in (*LISTS, *DEAD, *REFUSED):
        parser.add_argument(spelled(f"--{name}", {}), dest=name, nargs="*")
    return parser


def translate(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(arguments of the verb ``train``, lines to tell) of a command line of train_edit.py.  Raises UserError."""
    refuse_secrets(arguments)
    known, rest = make_parser().parse_known_args([spelled(argument, {}) for argument in arguments])
    given = {name: value for name, value in vars(known).items() if value is not None}
    _refuse(given, rest)
    told = [f"--{name} {DEAD[name]}: left out" for name in given if name in DEAD]
    ours = {VALUES[name]: value for name, value in given.items() if name in VALUES}
    ours |= {key: value for name, (key, value) in SWITCHES.items() if given.get(name)}
    ours |= {LISTS[name]: ",".join(value) for name, value in given.items() if name in LISTS}
    ours |= run_folder(given["output_dir"]) | resumed(given.get("resume_from_checkpoint"), given["output_dir"])
    defaults = DEFAULTS | {"mixed_precision": environ.get("ACCELERATE_MIXED_PRECISION", "no")}
    if "max_train_steps" in ours:  # it wins, as there
        ours.pop("num_train_epochs", None)
        del defaults["num_train_epochs"]
    ours = defaults | ours
    if ours["lr_scheduler"] == "constant":  # diffusers' has no warm-up
        if "lr_warmup_steps" in given:
            told.append("--lr_warmup_steps does nothing with --lr_scheduler constant: take constant_with_warmup")
        del ours["lr_warmup_steps"]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in ours.items()]
    return ["--method=sft", "--shift=0", *words, *rest], told


def _refuse(given: Mapping[str, Any], rest: Sequence[str]) -> None:
    """Raises UserError for the first flag that cannot be meant."""
    for name, value in given.items():
        if name in REFUSED:
            raise UserError(f"--{name} is not taken here", REFUSED[name])
        if name in FIXED and value != FIXED[name]:
            raise UserError(f"--{name} {value}: it is {FIXED[name]} here", "leave it out")
    mine = fields_of("sft").keys() - {"method"}
    for word in rest:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("-") and not _is_number(word) and name.replace("-", "_") not in mine | {"help"}:
            raise UserError(
                f"{word.partition('=')[0]}: unknown flag",
                "take those of train_edit.py, or of python -m train_t2i train --method sft",
            )
    for name in ("pretrained_model_name_or_path", "train_data_meta", "output_dir"):
        if name not in given:
            raise UserError(f"--{name} is not given", "train_edit.py cannot do without it")
    mode, modes = given.get("train_mode", "auto"), ("auto", *EDIT_FAMILIES)
    if mode not in modes:
        raise UserError(f"--train_mode {mode}: unknown", f"one of {', '.join(modes)}")


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-[0-9.]+(?:e-?[0-9]+)?", word) is not None


def run_folder(output_dir: str) -> dict[str, str]:
    """Their folder is the run's own: what is a name in a folder of runs here."""
    path = Path(output_dir)
    if path.name in ("", ".."):
        path = path.resolve()
    return {"output_dir": str(path.parent), "exp_name": path.name}


def resumed(value: str | None, output_dir: str) -> dict[str, str]:
    if value is None:
        return {}
    if value == "latest":  # starts anew where there is none
        return {"auto_resume": "on"}
    return {"resume_ckpt": str(checkpoint_of(value, output_dir))}


def checkpoint_of(value: str, output_dir: str = "") -> Path:
    """The record that ``OUTPUT_DIR/checkpoint-N`` means, or ``checkpoint-N`` alone; a step-N.pt or a run's folder stays."""
    path = Path(value)
    match = CHECKPOINT.fullmatch(path.name)
    if match is None:
        return path
    root = path.parent if len(path.parts) > 1 or not output_dir else Path(output_dir)
    return root / "checkpoints" / "torch_units" / f"step-{match[1]}.pt"


def bf16_export(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of the verb ``export``, lines to tell) of a command line of zero_to_bf16.py.  Raises UserError."""
    parser = Parser(
        prog="zero_to_bf16.py", description="A checkpoint as a bf16 pipeline folder that stock diffusers loads."
    )
    parser.add_argument("checkpoint", help="OUTPUT_DIR/checkpoint-N, a step-N.pt, or a run's folder (its latest)")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--max-shard-size", default="5GB", help="most bytes of a weights file (default: %(default)s)")
    parser.add_argument("--safe-serialization", nargs="?", const=True, default=True, type=parse_bool, help="always")
    parser.add_argument("-t", "--tag", help="did name one of several checkpoints in a folder: left out")
    parser.add_argument("--exclude-frozen-parameters", action="store_true", help="refused: an export is whole")
    parser.add_argument("-d", "--debug", action="store_true", help="does nothing: left out")
    given = parser.parse_args([spelled(argument, {}) for argument in arguments])
    if not given.safe_serialization:
        raise UserError("--safe_serialization off: pickles are not written", "leave it out")
    if given.exclude_frozen_parameters:
        raise UserError("--exclude_frozen_parameters is not taken here: an export is whole", "leave it out")
    told = ["--tag names nothing here, where a checkpoint is one step: left out"] if given.tag else []
    record = checkpoint_of(given.checkpoint)
    if not record.exists():
        steps = sorted(int(file.stem[5:]) for file in record.parent.glob("step-*.pt") if file.stem[5:].isdecimal())
        there = ", ".join(f"checkpoint-{step}" for step in steps) or "no checkpoint"
        raise UserError(f"{given.checkpoint}: no such checkpoint ({record})", f"there is: {there}")
    return [str(record), f"--out={given.out}", "--dtype=bf16", f"--max-shard-size={given.max_shard_size}"], told
