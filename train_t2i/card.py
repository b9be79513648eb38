"""The card of an exported pipeline or LoRA: README.md with the hub's metadata, and the pictures that it shows.

What it tells of a run's settings are numbers, switches and choices alone: nothing that a person typed as text, and so no
path, address or secret, gets into it.  Base model, rewards and initial weights are named as checkpoints/manifest.toml does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_t2i import redact, terms
from train_t2i.card_usage import Usage
from train_t2i.config import EDIT_FAMILIES, Settings, fields_of
from train_t2i.evaluation.table import columns_of, escaped, markdown_row, markdown_table
from train_t2i.pages.parts import shrunk
from train_t2i.report_data import Sheet, draws_teacher, opened, read_sheets

if TYPE_CHECKING:
    from train_t2i.export.recipe import Recipe
    from train_t2i.student import ImageModel

METHODS = {
    "dmdr": "distribution matching distillation with rewards (DMDR, arXiv 2511.13649)",
    "direct": "Direct Distillation, regression of the whole sampler on what the teacher rendered",
    "arcflow": "ArcFlow",
    "sft": "supervised training",
}
PLAIN = ("resolution",)  # settings in words that hold nothing but a size
NO_RESULTS = ("model", "network_calls", "ms_per_image")  # columns of a table that say nothing of its images
MAX_WIDGETS = 8
GRID_WIDTH_PX, SAMPLE_WIDTH_PX, JPEG_QUALITY = 1280, 512, 88
IMAGES = "images"  # folder beside the card


@dataclass(frozen=True)
class Card:
    """What is told of a student."""

    title: str  # ORG/NAME, or the folder's name
    model: ImageModel
    recipe: Recipe
    dtype: str  # of the saved weights: float32, float16, bfloat16
    to: str = "pipeline"  # or lora, kohya
    table: Sequence[Mapping[str, Any]] = ()  # rows of evaluate

    def write(self, folder: Path) -> None:
        """README.md and its pictures into an exported folder.  Raises OSError, UserError."""
        from huggingface_hub import ModelCard

        sheet = self.sheet()
        pictures = write_pictures(sheet, folder / IMAGES, 0 if self.edits else MAX_WIDGETS) if sheet else []
        found, complete = self.stages
        body = "\n\n".join(
            part
            for part in (
                self.summary(found[0]),
                pictures_part(sheet, pictures, draws_teacher(self.model.settings.as_dict())),
                self.usage.text(),
                table_part(self.table),
                terms_part(self.built, complete),
                training_part(found),
            )
            if part
        )
        metadata = self.metadata(sheet, pictures)
        text = f"---\n{metadata.to_yaml()}\n---\n\n# {escaped(self.title)}\n\n{body}\n"
        ModelCard(redact.clean(text)).save(folder / "README.md")

    @property
    def edits(self) -> bool:
        return self.model.settings.run.model_family in EDIT_FAMILIES

    @cached_property
    def stages(self) -> tuple[list[terms.Stage], bool]:
        return terms.stages(str(self.model.run), int(self.model.step or 0))

    @cached_property
    def built(self) -> list[tuple[str, terms.Origin]]:
        return terms.built_on(self.stages[0], terms.read())

    @property
    def base(self) -> terms.Origin:
        return next(found for role, found in self.built if role == "base model")

    @property
    def usage(self) -> Usage:
        run = self.model.settings.run
        return Usage(
            self.title, self.to, run.model_family, self.recipe, self.dtype, self.base.repository,
            own_code=run.method == "arcflow",
        )  # fmt: skip

    def sheet(self) -> Sheet | None:
        """The newest sample sheet that is not of a later step than the student."""
        sheets = read_sheets(Path(str(self.model.run)) / "samples")
        return next((sheet for sheet in reversed(sheets) if sheet.step <= int(self.model.step or 0)), None)

    def metadata(self, sheet: Sheet | None, pictures: Sequence[str]) -> Any:
        """The hub's.  A LoRA is an adapter of its base, which user interfaces then offer it with."""
        from huggingface_hub import ModelCardData

        run, base = self.model.settings.run, self.base
        kind, lora = "image-to-image" if self.edits else "text-to-image", self.to != "pipeline"
        tags = [
            kind,
            *(["lora"] if lora else []),
            *(["diffusers", "diffusers-training"] if self.usage.in_diffusers else []),
        ]
        tags += [] if run.method == "sft" else ["distillation", "few-step"]
        told = zip(sheet.prompts if sheet else (), pictures[:-1], strict=False)
        widget = [{"text": prompt, "output": {"url": path}} for prompt, path in told]
        relation = "adapter" if lora else "finetune"
        related = {"base_model": base.repository, "base_model_relation": relation} if base.repository else {}
        results = eval_results(self.table, str(self.model.run), self.model.step, kind)
        return ModelCardData(
            library_name="diffusers" if self.usage.in_diffusers else None, pipeline_tag=kind, tags=tags,
            model_name=self.title.rpartition("/")[2] if results else None, eval_results=results or None, **base.metadata,
            **related, **({"widget": widget} if widget else {}),
        )  # fmt: skip

    def summary(self, stage: terms.Stage) -> str:
        run = self.model.settings.run
        calls = self.model.num_network_calls
        height_px, width_px = self.model.settings.size_px
        kind = ("A fine-tuned model", "A student") if self.to == "pipeline" else ("A LoRA", "A LoRA")
        made = kind[0] if run.method == "sft" else f"{kind[1]} that makes an image in {calls} network call"
        plural = "" if run.method == "sft" or calls == 1 else "s"
        return (
            f"{made}{plural}, at {width_px} x {height_px} px. Trained with {METHODS[run.method]}: "
            f"{self.model.step:,} generator updates, {stage.record['samples_seen']:,} samples seen, global batch "
            f"{stage.record['global_batch']}, on {stage.record['world_size']} process"
            f"{'es' if stage.record['world_size'] > 1 else ''}."
        )


# -- pictures --------------------------------------------------------------------------------------------------------


def write_pictures(sheet: Sheet, folder: Path, count: int) -> list[str]:
    """Names of the student's first images, then of the whole sheet, as JPEG files beside the card."""
    from train_t2i.gallery_images import student_files

    folder.mkdir(parents=True)
    names = []
    files = [file for file in student_files(sheet)[:count] if file.is_file()]
    widths = [(f"{i:02d}", file, SAMPLE_WIDTH_PX) for i, file in enumerate(files)]
    for name, file, width_px in [*widths, ("sheet", sheet.grid, GRID_WIDTH_PX)]:
        shrunk(opened(file), width_px).save(folder / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
        names.append(f"{IMAGES}/{name}.jpg")
    return names


def pictures_part(sheet: Sheet | None, pictures: Sequence[str], teacher: bool) -> str:
    if sheet is None:
        return ""
    rows = "Below each image of the student, the teacher's." if teacher else ""
    prompts = "\n".join(f"{i}. {escaped(prompt)}" for i, prompt in enumerate(sheet.prompts[:MAX_WIDGETS], 1))
    return (
        f"![Samples at step {sheet.step}]({pictures[-1]})\n\nSamples at step {sheet.step}, not chosen: the run's own "
        f"sample prompts, with the same noise at every step. {rows}\n\n<details><summary>Prompts, left to right</summary>\n\n{prompts}\n\n</details>"
    )


# -- what it measures, what it rests on ------------------------------------------------------------------------------


def table_part(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "## Evaluation\n\nNone was given to the export: judge by your own prompts before you rely on it."
    counts = sorted({f"{row['count']:,}" for row in rows if isinstance(row.get("count"), int)})
    told = f"{' or '.join(counts)} prompts a model. " if counts else ""
    return (
        "## Evaluation\n\n"
        + "\n".join(markdown_table(rows))
        + f"\n\n{told}In brackets: 95 % bootstrap intervals of the mean over "
        "prompts. Rewards that it was trained on rise by themselves: see the settings below for which those are."
    )


def eval_results(rows: Sequence[Mapping[str, Any]], run: str, step: int | None, task: str) -> list[Any]:
    """What the table measured of this very step of this run, as the hub's ``model-index`` has it; of other rows nothing."""
    from huggingface_hub import EvalResult

    own = [
        row
        for row in rows
        if row.get("run") and Path(row["run"]).resolve() == Path(run).resolve() and row.get("step") == step
    ]
    names = [name for name in columns_of(own) if name not in NO_RESULTS]
    return [
        EvalResult(
            task_type=task, dataset_type="prompts", dataset_name=f"{row['count']} prompts, first seed {row['seed']}",
            metric_type=name, metric_value=row[name],
        )
        for row in own
        for name in names
        if row.get(name) is not None
    ]  # fmt: skip


def terms_part(built: Sequence[tuple[str, terms.Origin]], complete: bool) -> str:
    lines = [markdown_row(["for", "what", "licence"]), markdown_row(["---"] * 3)]
    for role, found in built:
        name = f"[{escaped(found.repository)}](https://huggingface.co/{found.repository})" if found.repository else ""
        lines.append(markdown_row([escaped(role), name or escaped(found.name), escaped(found.licence)]))
    missing = (
        ""
        if complete
        else "\n\nAn earlier stage of this run was not at hand when it was exported: what it used is missing."
    )
    return (
        "## What it was made from\n\n"
        + "\n".join(lines)
        + "\n\nA student is a derivative of its base model and of its "
        f"initial weights, and has their terms; those of a reward may restrict what it is used for.{missing}"
    )


# -- settings --------------------------------------------------------------------------------------------------------


def public_settings(settings: Settings) -> dict[str, Any]:
    """Numbers, switches and choices that shape the result, by name."""
    values = settings.as_dict()
    told = {}
    for name, field in fields_of(settings.run.method).items():
        value = values[name]
        shapes = field.metadata["resume"] != "free" or name == "max_train_steps"
        harmless = isinstance(value, bool | int | float) or field.metadata["choices"] or name in PLAIN
        if shapes and harmless and value is not None:
            told[name] = value
    return told


def training_part(found: Sequence[terms.Stage]) -> str:
    """A table a stage, the last one first, folded."""
    parts = []
    for i, stage in enumerate(found):
        rows = [markdown_row([f"`{name}`", f"`{value}`"]) for name, value in public_settings(stage.settings).items()]
        name = "Settings" if i == 0 else f"Settings of the stage before it, {stage.settings.run.method}"
        table = "\n".join([markdown_row(["setting", "value"]), markdown_row(["---", "---"]), *rows])
        parts.append(f"<details><summary>{name}</summary>\n\n{table}\n\n</details>")
    version = found[0].record.get("code_version", "")
    made = f"Trained and exported with train_t2i {version}.".replace(" .", ".")
    return f"## Training\n\n{made} Words that were given as settings, such as paths, are left out.\n\n" + "\n\n".join(
        parts
    )
