"""Every setting of a run: one field, one flag, one default, one line of help, one rule for resuming.

The defaults are the published recipe of one-step SDXL; launchers hold what differs.  Nothing heavy is imported here, so
that ``--help`` answers at once.  ``resume`` says what a changed setting means when a run is continued: ``fatal`` refuses,
``warn`` says so and goes on, ``free`` is nobody's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train_t2i.errors import UserError
from train_t2i.flags import flag
from train_t2i.method_configs import METHOD_CONFIGS, ArcFlowConfig, DirectConfig, DMDRConfig, SFTConfig
from train_t2i.rates import SCHEDULERS

__all__ = ["METHOD_CONFIGS", "ArcFlowConfig", "Config", "DMDRConfig", "DirectConfig", "SFTConfig", "Settings", "flag"]

FAMILY_NAMES = ("sdxl", "sd3", "flux", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus")
EDIT_FAMILIES = {"qwen_image_edit": 1, "qwen_image_edit_plus": 3}  # -> the most sources of a row
METHOD_NAMES = tuple(METHOD_CONFIGS)
BASE_QUANTS = ("fp8", "int8", "nf4")
RECOMPUTABLE = ("networks", "decoder", "rewards")  # by --gradient-checkpointing
# layout -> role -> (module, its adapter)
LAYOUTS: dict[str, dict[str, tuple[str, str | None]]] = {
    "shared": {"generator": ("base", "generator"), "guidance": ("base", "guidance"), "teacher": ("base", None)},
    "paired": {"generator": ("gen", None), "guidance": ("base", "guidance"), "teacher": ("base", None)},
    "paired_lora": {"generator": ("gen", "generator"), "guidance": ("base", "guidance"), "teacher": ("base", None)},
    "separate": {"generator": ("gen", None), "guidance": ("gui", None), "teacher": ("base", None)},
}


@dataclass(frozen=True)
class Config:
    """What the loop, the model, the data and the optimizer read, whatever the method."""

    # -- method, model
    method: str = flag("dmdr", "what is trained and by which losses", choices=METHOD_NAMES)
    model_family: str = flag("auto", "architecture; auto reads model_index.json", choices=("auto", *FAMILY_NAMES))
    pretrained_model: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0", "teacher: hub id, pipeline folder or single safetensors file"
    )
    vae: str | None = flag(None, "VAE to use instead of the model's own (folder or hub id)")
    tiny_vae: str | None = flag(None, "AutoencoderTiny whose decoder serves rewards (folder or hub id)")
    generator_init: str | None = flag(None, "existing few-step LoRA or weights that the generator starts from")
    xl_ode_pretrain_path: str | None = flag(
        None,
        "ODE initialisation of a one-step generator: its denoiser's state dict or folder, or an ode run's step-N.pt",
    )
    resolution: str = flag("1024", "image size in pixels: N or WIDTHxHEIGHT")
    sample_num_steps: int = flag(1, "network calls of the student", low=1, high=500)
    sample_type: str = flag(
        "sde",
        "between the student's steps: sde re-noises its clean estimate, ode follows its velocity",
        choices=("sde", "ode"),
    )
    shift: float = flag(
        1.0, "time shift of the student's grid (more than one step); 0: the model's own at this size", low=0
    )
    text_length: int = flag(0, "tokens of the longest text (T5, Qwen2.5-VL); 0: the pipeline's own", low=0)
    source_size: int = flag(
        1024, "edit models: side in pixels of the square that has a source's area, as the VAE encodes it", low=32
    )
    source_seen_size: int = flag(384, "the same, as the text encoder of qwen_image_edit_plus sees it", low=32)
    guidance_embed: float = flag(3.5, "what a guidance-distilled network (FLUX.1-dev) is told, in every role", low=0)
    lora_targets: str = flag(
        "", "layers that get a LoRA: comma list of regular expressions for the end of their names; empty: the family's"
    )
    use_lora_gen: bool = flag(
        False, "train the generator as a LoRA (dmdr: of twice --lora-rank) instead of all weights"
    )
    lora_rank: int = flag(32, "LoRA rank of the guidance network, or of what is trained alone", low=1)
    base_quant: str = flag(
        "none",
        "frozen networks: none (in --mixed-precision), or the linear layers of their blocks in 8 or 4 bits (bitsandbytes)",
        choices=("none", *BASE_QUANTS),
    )
    layout: str = flag(
        "auto",
        "which roles share weights; auto: full generator paired, LoRA shared, LoRA on an initialised one paired_lora",
        choices=("auto", *LAYOUTS),
    )
    # -- data
    data_path_train: str = flag(
        "t2i-2m-filtered-prompts.txt",
        "prompts: txt, csv, tsv, jsonl, json or parquet; several with commas, a glob, a folder of them, or a dataset of the "
        "hub: hub:ORG/NAME[:SPLIT][:COLUMN] (direct: a pairs folder or an image table with seeds; sft and edit models: an "
        "image table)",
    )
    train_data_dir: str | None = flag(
        None,
        "image tables: where their relative paths begin (default: the table's folder); empty: paths are taken as written",
    )
    max_bad_fraction: float = flag(
        0.0, "image tables: share of rows that may be unusable and are left out; 0: the first one stops the run",
        resume="warn", low=0, below=1,
    )  # fmt: skip
    num_workers: int = flag(4, "processes that read images, where the data has some", resume="free", low=0)
    prompt_cache: str | None = flag(
        None, "folder that the cache verb made from the same prompts: no text encoder is loaded", resume="warn"
    )
    batch_size: int = flag(8, "rows a process and micro-batch", low=1)
    batch_size_test: int = flag(2, "number of sample images", resume="free", low=1)
    sample_prompts: str | None = flag(None, "file of prompts for the sample images (default: the first)", resume="free")
    # -- optimisation
    learning_rate_gen: float = flag(1e-7, "learning rate of the generator", low=0)
    lr_scheduler: str = flag(
        "constant", "shape of the rates over --max-train-steps, after the warm-up", choices=SCHEDULERS
    )
    lr_warmup_steps: int = flag(0, "steps over which the rates rise from 0", low=0)
    lr_num_cycles: int = flag(1, "falls of --lr-scheduler cosine_with_restarts", low=1)
    lr_power: float = flag(1.0, "power of --lr-scheduler polynomial", above=0)
    adam_beta1: float = flag(0.9, "AdamW", low=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW", low=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW", low=0)
    adam_weight_decay: float = flag(0.01, "AdamW, of the generator; the guidance network has none", low=0)
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit state (bitsandbytes)")
    offload_optimizer: bool = flag(
        False,
        "AdamW's state and the moving average wait in the host's memory and come to the GPU for updates: less memory, more time",
        resume="free",
    )
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: never", low=0)
    gradient_accumulation_steps: int = flag(1, "micro-batches an update", low=1)
    gradient_checkpointing: bool | str = flag(
        False,
        "recompute activations in backward, of networks, decoder and rewards or of some, as decoder+rewards: less memory, "
        "more time; host: on, and what is still kept of networks waits in the host's memory; auto: the fastest of these "
        "that is planned to fit on this GPU (on a CPU: on)",
        resume="warn",
        words=("auto", "host"),
        parts=RECOMPUTABLE,
    )
    compile: str = flag(
        "off",
        "blocks: torch.compile the networks' repeated blocks; slower until each is compiled (minutes), equal up to rounding",
        resume="warn",
        choices=("off", "blocks"),
    )
    mixed_precision: str = flag("fp16", "number format of the network calls", choices=("no", "fp16", "bf16"))
    seed: int = flag(30, "seed of everything random", low=0, high=2**63 - 1)
    # -- run
    output_dir: str = flag("runs", "folder of runs", resume="free")
    exp_name: str = flag("dmdr", "name of this run's folder", resume="free")
    max_train_steps: int = flag(3000, "generator updates in all", resume="free", low=1)
    num_train_epochs: int = flag(
        0, "passes over the data (sft, direct) instead of --max-train-steps; 0: that decides", resume="free", low=0
    )
    logging_steps: int = flag(
        1, "write the logs every so many steps; until then a tick does not wait for its numbers", resume="free", low=1
    )
    sample_steps: int = flag(100, "sample images every so many steps; 0: never", resume="free", low=0)
    checkpoint_steps: int = flag(500, "save every so many steps; 0: only at the end", resume="free", low=0)
    checkpoint_minutes: float = flag(0.0, "save every so many minutes too; 0: never", resume="free", low=0)
    checkpoints_total_limit: int = flag(0, "keep this many checkpoints; 0: all", resume="free", low=0)
    resume_ckpt: str | None = flag(None, "torch_units/step-N.pt to go on from, or latest", resume="free")
    auto_resume: bool = flag(False, "go on from this run's newest checkpoint where there is one", resume="free")
    hang_seconds: int = flag(
        1800, "end a process that stood still for so long (three times it up to the first step); 0: never",
        resume="free", low=0,
    )  # fmt: skip
    max_skipped: int = flag(20, "stop after so many non-finite updates in a row", resume="free", low=1)
    report_to: str = flag("jsonl", "comma list of jsonl, wandb, tensorboard (jsonl is always on)", resume="free")
    teacher_num_steps: int = flag(25, "network calls of the teacher's sample images", resume="free", low=1, high=500)
    teacher_cfg: float = flag(7.0, "guidance of the teacher's sample images", resume="free", low=1)
    backend: str = flag(
        "auto",
        "what several processes share: ddp (nothing), fsdp2, zero2, zero3; auto: what the launcher's config asks for",
        resume="free",
        choices=("auto", "ddp", "fsdp2", "zero2", "zero3"),
    )
    dry_run: bool = flag(False, "print the settings and leave", resume="free")
    config: str | None = flag(None, "YAML file of settings; flags win", resume="free")

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The parts whose activations backward recomputes; ``auto`` counts as on until it is decided."""
        value = self.gradient_checkpointing
        if isinstance(value, bool) or value in ("auto", "host"):
            return RECOMPUTABLE if value else ()
        return tuple(value.split("+"))

    @property
    def keeps_on_host(self) -> bool:
        """Whether what networks keep for backward waits in the host's memory."""
        return self.gradient_checkpointing == "host"


@dataclass(frozen=True)
class Settings:
    """A whole run's settings: what every method reads, and what this one does."""

    run: Config
    method: Any  # one of METHOD_CONFIGS

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.run), **dataclasses.asdict(self.method)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """Back from ``as_dict``; settings of older versions that are gone are left out."""
        method = METHOD_CONFIGS[values["method"]]
        own = {f.name for f in dataclasses.fields(method)}
        common = {f.name for f in dataclasses.fields(Config)}
        return Settings(
            Config(**{k: v for k, v in values.items() if k in common}),
            method(**{k: v for k, v in values.items() if k in own}),
        )

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width)."""
        return parse_resolution(self.run.resolution)


def source_counts(family: str) -> tuple[int, int]:
    """The fewest and the most sources of a row: qwen_image_edit has exactly one, whoever takes several may have none."""
    most = EDIT_FAMILIES.get(family, 0)
    return (1, 1) if most == 1 else (0, most)


def seen_side(run: Config) -> int | None:
    """Side of the square that has a source's area as the text encoder sees it; None: it sees what the VAE does."""
    return run.source_seen_size if run.model_family == "qwen_image_edit_plus" else None


def parse_resolution(text: str) -> tuple[int, int]:
    """``N`` or ``WIDTHxHEIGHT`` -> (height, width) in pixels."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--resolution {text}: not a size", "give N or WIDTHxHEIGHT, in pixels")
    width, height = int(parts[0]), int(parts[-1])
    return height, width


def fields_of(method: str) -> dict[str, dataclasses.Field]:
    """Field name -> field, of the run and of a method."""
    return {f.name: f for kind in (Config, METHOD_CONFIGS[method]) for f in dataclasses.fields(kind)}


def resolved_layout(run: Config) -> str:
    """The layout that ``auto`` stands for."""
    if run.layout != "auto":
        return run.layout
    if not run.use_lora_gen:
        return "paired"
    return "paired_lora" if run.generator_init or run.xl_ode_pretrain_path else "shared"


def listed(text: str) -> tuple[str, ...]:
    """A comma list's entries."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def any_of(targets: Sequence[str]) -> str:
    """The expression that a layer's whole name matches where its end, from a dot on, matches a target."""
    return rf"(?:.*\.)?(?:{'|'.join(targets)})"
