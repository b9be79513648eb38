"""``python -m train_t2i benchmark``: where the time and the memory of a DMDR step go, as JSON.

One row a layout and a checkpointing choice: seconds a tick and a step, split into data, text encoding, rollout, guidance
update, generator update and rewards (the last is part of the generator update's wall time and is taken out of it),
images a second, network calls a step, peak memory.  ``--size sdxl`` takes a randomly initialised SDXL and ViT-H-14 towers.
``--part rewards`` measures what comes after the network alone: decoding, scoring, and the gradient back to the latents.
``--part published`` compares a step with the same step as the method's authors compute it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.cli import parse_verb
from train_t2i.config import LAYOUTS, Config, DMDRConfig, Settings, flag
from train_t2i.config_checks import check
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError

# What the reward stage alone has none of
OF_WHOLE_STEPS = ("layouts", "sample_num_steps", "ratio_update", "lora_rank", "steps")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time DMDR steps in every layout, with and without gradient checkpointing."""

    size: str = flag(
        "folder", "folder: the model of --pretrained-model; sdxl: random, full size", choices=("folder", "sdxl")
    )
    pretrained_model: str = flag("stabilityai/stable-diffusion-xl-base-1.0", "teacher")
    tiny_vae: str | None = flag(None, "AutoencoderTiny whose decoder serves rewards")
    clip_reward_model: str | None = flag(None, "CLIP reward")
    hpsv2_reward_model: str | None = flag(None, "HPSv2.1 reward")
    data_path_train: str = flag("prompts.txt", "prompts")
    part: str = flag(
        "step",
        "what is measured: whole steps, the reward stage of one, or a step as the published trainer computes it beside ours",
        choices=("step", "rewards", "published"),
    )
    layouts: str = flag(",".join(LAYOUTS), "comma list")
    resolution: str = flag("1024", "image size in pixels")
    sample_num_steps: int = flag(1, "network calls of the student", low=1)
    ratio_update: int = flag(5, "guidance updates a generator update", low=1)
    batch_size: int = flag(8, "rows", low=1)
    lora_rank: int = flag(32, "LoRA rank of the guidance network", low=1)
    mixed_precision: str = flag("fp16", "number format of the network calls", choices=("no", "fp16", "bf16"))
    steps: int = flag(3, "generator steps that are timed, after one that is not", low=1)
    out: str | None = flag(None, "JSON file to write")


def settings_of(config: BenchmarkConfig, layout: str, checkpointing: bool, reward_batch_size: int = 0) -> Settings:
    """The settings of one row, checked as the trainer checks them."""
    rewarded = config.clip_reward_model or config.hpsv2_reward_model
    adapted = any(adapter for _, adapter in LAYOUTS[layout].values())
    run = Config(
        pretrained_model=config.pretrained_model, tiny_vae=config.tiny_vae, resolution=config.resolution,
        sample_num_steps=config.sample_num_steps, layout=layout, use_lora_gen=LAYOUTS[layout]["generator"][1] is not None,
        lora_rank=config.lora_rank if adapted else Config.lora_rank, batch_size=config.batch_size, mixed_precision=config.mixed_precision,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    method = DMDRConfig(
        ratio_update=config.ratio_update, cold_start_iter=0 if rewarded else run.max_train_steps,
        clip_reward_model=config.clip_reward_model, hpsv2_reward_model=config.hpsv2_reward_model,
        reward_batch_size=reward_batch_size,
    )  # fmt: skip
    settings = Settings(run, method)
    check(settings)
    return settings


def write(config: BenchmarkConfig, rows: list[dict[str, Any]]) -> None:
    """The JSON of the rows so far."""
    if not config.out:
        return
    from train_t2i.storage import write_atomically

    text = json.dumps({"settings": dataclasses.asdict(config), "rows": rows}, indent=1) + "\n"
    try:
        write_atomically(Path(config.out), text)
    except OSError as error:
        raise UserError(
            f"--out {config.out}: cannot be written ({error.strerror})", "choose another file, or make room", EXIT_DISK
        ) from None


def check_benchmark(config: BenchmarkConfig, layouts: Sequence[str]) -> None:
    """All that can be known before the first model is loaded."""
    import torch

    from train_t2i.feed import Prompts

    if unknown := sorted(set(layouts) - set(LAYOUTS)):
        raise UserError(f"--layouts {','.join(unknown)}: unknown", f"known: {', '.join(LAYOUTS)}")
    for field in dataclasses.fields(config):
        given = getattr(config, field.name) != field.default
        if config.part == "rewards" and field.name in OF_WHOLE_STEPS and given:
            flag_name = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag_name} does nothing with --part rewards", "leave it out, or take --part step")
    if config.size == "sdxl" and not torch.cuda.is_available():
        raise UserError(
            "--size sdxl needs a CUDA device", "give a small model as --pretrained-model with --size folder"
        )
    if (
        config.part == "rewards"
        and config.size == "folder"
        and not config.clip_reward_model
        and not config.hpsv2_reward_model
    ):
        raise UserError("--part rewards without a reward model", "give --clip-reward-model or --hpsv2-reward-model")
    for layout in layouts:
        settings_of(config, layout, False)
    Prompts(config.data_path_train)
    write(config, [])


def rows_of(config: BenchmarkConfig, layouts: Sequence[str]) -> Iterator[dict[str, Any]]:
    from train_t2i.benchmark import published, reward_stage, step

    if config.part == "step":
        return step.rows(config, layouts)
    return reward_stage.rows(config) if config.part == "rewards" else published.rows(config)


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(BenchmarkConfig, "benchmark", arguments)
    layouts = config.layouts.split(",")
    check_benchmark(config, layouts)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if config.size == "sdxl":
            from train_t2i.engine import DTYPES
            from train_t2i.full_size import random_vit_h_14

            tower = str(random_vit_h_14(Path(folder), DTYPES[config.mixed_precision]))
            config = dataclasses.replace(config, clip_reward_model=tower, hpsv2_reward_model=tower)
        for row in rows_of(config, layouts):
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(config, rows)
    return EXIT_DONE
