"""``python -m train_t2i benchmark``: where the time and the memory of a DMDR step go, as JSON, a table and a picture.

One row a combination of what the comma lists name, each in a fresh process: seconds a tick and a step, split into data, text
encoding, rollout, guidance update, generator update and rewards (the last is part of the generator update's wall time and is
taken out of it), FLOPs of the network calls, images a second, peak memory.  ``--models`` takes published models with random
weights too.  ``--part rewards`` measures what comes after the network alone: decoding, scoring, and the gradient back to the
latents.  ``--part published`` compares a step with the same step as the method's authors compute it, gradients too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_t2i.benchmark.rows import CHECKPOINTING, Row, combinations, row_words, still_to_measure
from train_t2i.cli import parse_verb
from train_t2i.config import LAYOUTS, Config, DMDRConfig, Settings, flag
from train_t2i.config_checks import check
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError
from train_t2i.plan import MODELS

# What the reward stage alone has none of
OF_WHOLE_STEPS = ("sample_num_steps", "ratio_update", "lora_rank", "steps")
OF_ROWS = (
    "models",
    "random_rewards",
    "layouts",
    "backends",
    "checkpointing",
    "schedules",
    "num_processes",
    "append",
    "row_limit_s",
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time DMDR steps in every layout, with and without gradient checkpointing, or in what the lists below name."""

    pretrained_model: str = flag("stabilityai/stable-diffusion-xl-base-1.0", "teacher")
    tiny_vae: str | None = flag(None, "AutoencoderTiny whose decoder serves rewards")
    clip_reward_model: str | None = flag(None, "CLIP reward")
    hpsv2_reward_model: str | None = flag(None, "HPSv2.1 reward")
    random_rewards: str | None = flag(
        None, "file of a ViT-H-14 with random weights that serves as both rewards; made where it is not there"
    )
    data_path_train: str = flag("prompts.txt", "prompts")
    part: str = flag(
        "step",
        "what is measured: whole steps, the reward stage of one, or a step as the published trainer computes it beside ours",
        choices=("step", "rewards", "published"),
    )
    models: str | None = flag(
        None, f"comma list of published models ({', '.join(MODELS)}), with random weights, or of pipeline folders"
    )
    layouts: str = flag(",".join(LAYOUTS), "comma list")
    backends: str = flag("ddp", "comma list of ddp, fsdp2, zero2, zero3; all but the first with --num-processes")
    checkpointing: str = flag("off,on", f"comma list of {', '.join(CHECKPOINTING)}: gradient checkpointing")
    compile: str = flag("off", "comma list of off and blocks: torch.compile of the repeated blocks")
    schedules: str = flag("ours", "comma list of ours and published: as which trainer a step is computed")
    num_processes: int = flag(1, "processes a row, one a device", low=1)
    resolution: str = flag("1024", "image size in pixels")
    sample_num_steps: int = flag(1, "network calls of the student", low=1)
    ratio_update: int = flag(5, "guidance updates a generator update", low=1)
    batch_size: int = flag(8, "rows", low=1)
    lora_rank: int = flag(32, "LoRA rank of the guidance network", low=1)
    mixed_precision: str = flag(
        "fp16", "number format of the network calls: no, fp16 or bf16; a comma list in --part step"
    )
    steps: int = flag(3, "generator steps that are timed, after one that is not", low=1)
    row_limit_s: float = flag(0.0, "seconds after which a row is given up; 0: never", low=0)
    append: bool = flag(False, "keep the rows that --out has from before; those with figures are not measured again")
    out: str | None = flag(
        None, "JSON file to write; with rows of --part step a table (.md) and a picture (.png, .pdf) too"
    )


def settings_of(config: BenchmarkConfig, row: Row, reward_batch_size: int = 0) -> Settings:
    """The settings of one row, checked as the trainer checks them."""
    rewarded = config.clip_reward_model or config.hpsv2_reward_model
    adapted = any(adapter for _, adapter in LAYOUTS[row.layout].values())
    run = Config(
        pretrained_model=row.model, tiny_vae=config.tiny_vae, resolution=config.resolution,
        sample_num_steps=config.sample_num_steps, layout=row.layout, use_lora_gen=LAYOUTS[row.layout]["generator"][1] is not None,
        lora_rank=config.lora_rank if adapted else Config.lora_rank, batch_size=config.batch_size,
        mixed_precision=row.mixed_precision, gradient_checkpointing=row.checkpointing, backend=row.backend,
        compile=row.compile,
    )  # fmt: skip
    if row.is_random:
        from train_t2i.families.published import PUBLISHED

        found = PUBLISHED[row.model]
        run = dataclasses.replace(run, pretrained_model=found.repository, model_family=found.family)
    method = DMDRConfig(
        ratio_update=config.ratio_update, cold_start_iter=0 if rewarded else run.max_train_steps,
        clip_reward_model=config.clip_reward_model, hpsv2_reward_model=config.hpsv2_reward_model,
        reward_batch_size=reward_batch_size,
    )  # fmt: skip
    settings = Settings(run, method)
    check(settings)
    return settings


def write(config: BenchmarkConfig, rows: list[dict[str, Any]]) -> None:
    """The JSON of the rows so far; of whole steps the table and the picture too."""
    if not config.out:
        return
    from train_t2i.storage import write_atomically

    out = Path(config.out)
    try:
        write_atomically(out, json.dumps({"settings": dataclasses.asdict(config), "rows": rows}, indent=1) + "\n")
        if config.part == "step" and rows:
            from train_t2i.benchmark.page import draw, table

            write_atomically(out.with_suffix(".md"), "\n".join(table(rows)) + "\n")
            draw(rows, out)
    except OSError as error:
        raise UserError(
            f"--out {config.out}: cannot be written ({error.strerror})", "choose another file, or make room", EXIT_DISK
        ) from None


def kept(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """The rows that --append keeps.  Raises UserError."""
    if not config.append:
        return []
    if not config.out:
        raise UserError("--append without --out", "name the file that has the rows")
    if not Path(config.out).exists():
        return []
    try:
        return json.loads(Path(config.out).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"--append: {config.out} is no benchmark's JSON", "leave --append out, or name another"
        ) from None


def say_skipped(config: BenchmarkConfig, skipped: Sequence[dict[str, Any]]) -> None:
    """One line on what is not measured again, and on what it was measured."""
    if not skipped:
        return
    shown = ", ".join(row_words(row) for row in skipped)
    devices = " and ".join(sorted({str(row["device"]) for row in skipped}))
    print(f"skipped, as {config.out} has their figures (of {devices}): {shown}", file=sys.stderr)


def check_benchmark(config: BenchmarkConfig) -> list[Row]:
    """All that can be known before the first model is loaded; the rows."""
    import torch

    from train_t2i.feed import Prompts

    idle = () if config.part == "step" else (OF_ROWS if config.part == "published" else OF_ROWS + OF_WHOLE_STEPS)
    for field in dataclasses.fields(config):
        if field.name in idle and getattr(config, field.name) != field.default:
            flag_name = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag_name} does nothing with --part {config.part}", "leave it out, or take --part step")
    rows = combinations(config)
    if config.part != "step" and "," in config.mixed_precision:
        raise UserError(f"--mixed-precision {config.mixed_precision} with --part {config.part}", "give one")
    if any(row.is_random for row in rows) and not torch.cuda.is_available():
        raise UserError("--models: published sizes need a CUDA device", "name folders of small models")
    if config.part == "rewards" and not config.clip_reward_model and not config.hpsv2_reward_model:
        raise UserError("--part rewards without a reward model", "give --clip-reward-model or --hpsv2-reward-model")
    check_rows(config, rows)
    Prompts(config.data_path_train)
    return rows


def check_rows(config: BenchmarkConfig, rows: Sequence[Row]) -> None:
    """What is refused of some rows is told in their place; raises UserError where it is all of them."""
    refused = []
    for row in rows:
        try:
            settings_of(config, row)
        except UserError as error:
            refused.append(error)
    if len(refused) == len(rows):
        raise refused[0]


def rows_of(config: BenchmarkConfig, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    from train_t2i.benchmark import published, reward_stage, step

    if config.part == "step":
        return step.rows(config, rows)
    first = dataclasses.replace(rows[0], layout="shared", checkpointing=False)
    return reward_stage.rows(config, first) if config.part == "rewards" else published.rows(config, first)


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(BenchmarkConfig, "benchmark", arguments)
    wanted, rows = check_benchmark(config), kept(config)
    wanted, rows, skipped = still_to_measure(config, wanted, rows)
    say_skipped(config, skipped)
    write(config, rows)
    for row in rows_of(config, wanted) if wanted else ():
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(config, rows)
    return EXIT_DONE
