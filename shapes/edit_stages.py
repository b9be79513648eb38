"""The stages of the tiny Qwen-Image-Edit: an encoder that reads instructions and pictures, and a transformer.

The autoencoder is that of the tiny Qwen-Image, and its transformer is where this one starts.  The folder is one of
QwenImageEditPlusPipeline; QwenImageEditPipeline takes the same parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from shapes import finetune
from shapes import qwen_autoencoder as qa
from shapes.edit_oracle import edit_adherence, untouched
from shapes.edit_pictures import draw
from shapes.edit_text import QwenEditTextRecipe, new_processor, train_edit_text
from shapes.edits import KINDS
from shapes.flow_models import FlowRecipe, scheduler
from shapes.flow_stages import found, holder, loaded, part
from shapes.render import SIDE_PX
from shapes.stage import Paths, Stage
from shapes.tokenizer import new_qwen_edit_tokenizer
from train_t2i.families.qwen_image_edit import tell_token_types

QWEN_EDIT_TEXT = QwenEditTextRecipe()


@dataclass(frozen=True)
class EditRecipe(FlowRecipe):
    """That of a transformer, trained at times of its own: all that is hard to learn of edits is at high noise."""

    shift: float = 3.0


QWEN_EDIT = EditRecipe(
    "qwen_image_edit_plus",
    seed=30,
    width=104,
    heads=4,
    layers=4,
    legs=(4500, 8500, 15000, 19000, 23000),
    pictures=24000,
    learning_rate=3e-3,
)
CFGS = (1.0, 2.0)
EDITS, STEPS = 210, 25


def make_edit_text(paths: Paths, run_name: str) -> dict[str, float]:
    encoder, quality = train_edit_text(QWEN_EDIT_TEXT, found(Qwen2_5_VLForConditionalGeneration, paths, "qwen-text"))
    encoder.half().save_pretrained(part(paths, "qwen-edit-text"))
    return quality


def assemble(paths: Paths, folder: Path) -> None:
    """Write the half-precision pipeline folder, its transformer that of the tiny Qwen-Image."""
    tokenizer, start = new_qwen_edit_tokenizer(), paths.flow("qwen_image")
    pipeline = QwenImageEditPlusPipeline(
        vae=found(AutoencoderKLQwenImage, paths, "qwen-autoencoder"),
        text_encoder=found(Qwen2_5_VLForConditionalGeneration, paths, "qwen-edit-text"),
        transformer=loaded(QwenImageTransformer2DModel, start / "transformer"),
        tokenizer=tokenizer,
        processor=new_processor(QWEN_EDIT_TEXT, tokenizer),
        scheduler=scheduler("qwen_image"),
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


def make_edit_pipeline(paths: Paths, run_name: str) -> dict[str, float]:
    """The pipeline folder, its transformer trained by the trainer itself."""
    folder = paths.flow("qwen_image_edit")
    assemble(paths, folder)
    told: dict[str, object] = {
        "model-family": QWEN_EDIT.family, "source-size": SIDE_PX, "source-seen-size": SIDE_PX, "shift": QWEN_EDIT.shift,
    }  # fmt: skip
    trained = finetune.supervised(
        folder, paths.work, QWEN_EDIT, run_name, pictures_seed=QWEN_EDIT.pictures_seed, table=finetune.edits, more=told,
        legs=QWEN_EDIT.legs, threads=1, processes=2,
    )  # fmt: skip
    finetune.install(trained, folder / "transformer", QwenImageTransformer2DModel)
    return editor_quality(folder)


# ------------------------------------------------------------------ how well the stock pipeline edits
@contextmanager
def small_sources(side_px: int = SIDE_PX) -> Iterator[None]:
    """The stock pipeline brings sources to areas that are constants of its module: here to those of this world."""
    before = stock.CONDITION_IMAGE_SIZE, stock.VAE_IMAGE_SIZE
    stock.CONDITION_IMAGE_SIZE = stock.VAE_IMAGE_SIZE = side_px**2
    try:
        yield
    finally:
        stock.CONDITION_IMAGE_SIZE, stock.VAE_IMAGE_SIZE = before


def load_editor(folder: Path) -> Any:
    """The stock pipeline, whose text encoder is told where pictures are."""
    pipeline = QwenImageEditPlusPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    tell_token_types(pipeline.text_encoder)
    return pipeline


@torch.no_grad()
def edit_with(pipeline: Any, sources: list[Any], instruction: str, cfg: float, seed: int) -> Tensor:
    """(3, 64, 64) in [0, 1] from sources (64, 64, 3) uint8."""
    negative = {"negative_prompt": " "} if cfg > 1 else {}
    with small_sources():
        images = pipeline(
            [Image.fromarray(source) for source in sources], instruction, true_cfg_scale=cfg, height=SIDE_PX, width=SIDE_PX,
            num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed), output_type="pt", **negative,
        ).images  # fmt: skip
    return images[0].float().clamp(0, 1)


def editor_quality(folder: Path) -> dict[str, float]:
    """Oracle adherence of the stock pipeline on held-out edits at each guidance, what it does to the rest, and of the edits' own
    results, encoded and decoded."""
    pipeline, made = load_editor(folder), [draw("heldout", 0, index, KINDS) for index in range(EDITS)]
    sources = [[torch.from_numpy(one).permute(2, 0, 1) / 255 for one in shown] for _, shown, _ in made]
    prompts = [edit.instruction for edit, _, _ in made]
    several = torch.tensor([len(shown) > 1 for _, shown, _ in made])
    scores = {}
    for cfg in CFGS:
        images = torch.stack([edit_with(pipeline, made[i][1], prompts[i], cfg, seed=i) for i in range(EDITS)])
        right, apart = edit_adherence(images, prompts, sources), untouched(images, prompts, sources)
        where = f"{STEPS} steps, guidance {cfg:g}"
        scores[f"adherence, {where}"] = right.mean().item()
        scores[f"adherence of compositions, {where}"] = right[several].mean().item()
        scores[f"change elsewhere, {where}"] = apart.nanmean().item()
    targets = torch.stack([torch.from_numpy(target).permute(2, 0, 1) / 255 for _, _, target in made])
    kept = qa.decode(pipeline.vae, qa.encode(pipeline.vae, targets))
    return {**scores, "oracle on edits": edit_adherence(kept, prompts, sources).mean().item()}


def _transformer(paths: Paths) -> Path:
    return paths.flow("qwen_image_edit") / "transformer"


STAGES = (
    Stage(
        "qwen-edit-text",
        QWEN_EDIT_TEXT,
        ("qwen-text",),
        functools.partial(holder, name="qwen-edit-text"),
        make_edit_text,
    ),
    Stage(
        "qwen-image-edit",
        QWEN_EDIT,
        ("qwen-image", "qwen-edit-text"),
        _transformer,
        make_edit_pipeline,
    ),
)
