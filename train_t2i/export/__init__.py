"""``python -m train_t2i export RUN --to FORMAT``: a run's generator for other programs.

pipeline   a folder that ``DiffusionPipeline.from_pretrained`` loads: the generator with its LoRA merged in fp32, text encoders,
           tokenizers, VAE, and a scheduler whose config alone makes a call of N steps visit the student's own times
merged     of that folder the denoiser and the scheduler
lora       the generator's LoRA for ``load_lora_weights`` and ComfyUI, and the scheduler
kohya      the same LoRA under the names of kohya's trainers

``recommended.json`` has the call: N, guidance, size, text length.  The headers of the weights' files say how they are sampled
(recipe.py).  What is written is read back and compared before the folder gets its name.  All but ``merged`` have the hub's card,
``README.md``, and ``--push ORG/NAME`` uploads the folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_t2i.choice import RunChoice
from train_t2i.cli import parse_verb
from train_t2i.config import EDIT_FAMILIES, flag
from train_t2i.errors import EXIT_DONE, UserError
from train_t2i.evaluation.table import read_given_table
from train_t2i.push import check_push, upload

FORMATS = ("pipeline", "merged", "lora", "kohya")
ONE_FILE = ("lora", "kohya")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as torch calls them
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(KB|MB|GB|TB)", re.IGNORECASE)


@dataclass(frozen=True)
class ExportConfig(RunChoice):
    """Write a run's generator for diffusers, ComfyUI and kohya's tools."""

    to: str = flag(
        "pipeline",
        "what to write: pipeline (the folder of the model's own diffusers pipeline), merged (of that the denoiser and "
        "the scheduler), lora (for load_lora_weights and ComfyUI), kohya (the same under kohya's names)",
    )
    out: str | None = flag(None, "folder to write (default: RUN/FORMAT/step-N)")
    pretrained_model: str | None = flag(None, "where the run's base model lies now, if it has moved")
    vae: str | None = flag(None, "VAE to use instead of the run's")
    dtype: str = flag("fp32", "number format of the saved weights", choices=("fp32", "fp16", "bf16"))
    max_shard_size: str = flag("10GB", "most bytes of a weights file: a number and KB, MB, GB or TB")
    table: str | None = flag(None, "evaluation table to show in the card (JSON of the verb evaluate)")
    push: str | None = flag(None, "repository of the hub, ORG/NAME, to upload the folder to; private")
    push_public: bool = flag(False, "with --push: a public repository")
    dry_run: bool = flag(False, "with --push: write the folder and list what would be uploaded")


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is already there", "choose another folder, or remove it")


def check_asked(config: ExportConfig) -> None:
    """Mistakes that can be seen before anything is loaded."""
    match = SIZE.fullmatch(config.max_shard_size.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--max-shard-size {config.max_shard_size}: not a size", "e.g. 10GB")
    if config.to not in FORMATS:
        raise UserError(f"--to {config.to}: not available", f"available: {', '.join(FORMATS)}")
    if config.to in ONE_FILE and config.max_shard_size != ExportConfig().max_shard_size:
        raise UserError(f"--max-shard-size does nothing for --to {config.to}, which is one file", "leave it out")
    if config.to == "merged" and (config.table or config.push):
        given = "--push" if config.push else "--table"
        raise UserError(f"{given} does not go with --to merged, which has no card", "give --to pipeline or --to lora")
    check_push(config.push, public=config.push_public, dry_run=config.dry_run)
    if len(config.runs) != 1:
        raise UserError(f"{len(config.runs)} runs are given", "give the one run to export, OUTPUT_DIR/EXP_NAME")
    if config.out:
        refuse_existing(Path(config.out))


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(ExportConfig, "export", arguments)
    check_asked(config)
    rows = read_given_table(config.table) if config.table else []
    import torch

    from train_t2i.card import Card
    from train_t2i.export.denoiser import write_merged, write_pipeline
    from train_t2i.export.folders import new_folder, write_json
    from train_t2i.export.lora import write_kohya, write_lora
    from train_t2i.export.recipe import recipe_of
    from train_t2i.student import load_student

    model = load_student(
        config.runs[0], config.step, pretrained_model=config.pretrained_model, vae=config.vae,
        device=torch.device("cpu"),
    )  # fmt: skip
    out = Path(config.out) if config.out else Path(str(model.run)) / config.to / f"step-{model.step}"
    refuse_existing(out)
    dtype, recipe = getattr(torch, DTYPES[config.dtype]), recipe_of(model)
    with new_folder(out) as folder:
        if config.to in ONE_FILE:
            write = {"lora": write_lora, "kohya": write_kohya}[config.to]
            write(model, recipe, folder, dtype)
        else:
            write_weights = {"pipeline": write_pipeline, "merged": write_merged}[config.to]
            write_weights(model, recipe, folder, dtype, config.max_shard_size)
        write_json(folder / "recommended.json", recipe.call)
        if config.to != "merged":
            Card(config.push or out.name, model, recipe, DTYPES[config.dtype], config.to, rows).write(folder)
    call = ", ".join(f"{name}={value!r}" for name, value in recipe.call.items())
    print(f"{out}: pipe(prompt, {call})")
    if model.settings.run.model_family in EDIT_FAMILIES:
        print("its text encoder must be told which tokens are an image's: docs/supervised.md has the three lines")
    if model.settings.run.method == "arcflow":
        print(f"it is sampled with {out}/pipeline.py: docs/arcflow.md says how to load it")
    if config.push:
        print(upload(out, config.push, public=config.push_public, dry_run=config.dry_run))
    return EXIT_DONE
