"""Tiny random Qwen-Image-Edit models in the true pipeline format, with sources to show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from flow_models import parts
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from shapes.flow_models import scheduler
from shapes.tokenizer import new_qwen_tokenizer

PIPELINES: dict[str, Any] = {
    "qwen_image_edit": QwenImageEditPipeline,
    "qwen_image_edit_plus": QwenImageEditPlusPipeline,
}


def new_processor() -> Qwen2VLProcessor:
    sizes = {"min_pixels": 28 * 28, "max_pixels": 1280 * 28 * 28}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=new_qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**sizes), chat_template=None,
    )  # fmt: skip


def save_edit(folder: Path, family: str, seed: int = 0, *, zero_cond_t: bool = False) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = parts("qwen_image")
    if zero_cond_t:  # 2511
        made["transformer"].register_to_config(zero_cond_t=True)
    pipeline = PIPELINES[family](
        **made, tokenizer=new_qwen_tokenizer(), processor=new_processor(), scheduler=scheduler("qwen_image")
    )
    pipeline.save_pretrained(folder)
    return folder


def load_edit(folder: Path, family: str) -> Any:
    pipe = PIPELINES[family].from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours: resizing them is no lottery."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def save_edits(folder: Path, *, several: bool, count: int = 6) -> Path:
    """metadata.json in the seed format: rows of one source, and of two where ``several``; sources of two shapes."""
    rows = []
    for i in range(count):
        names = [f"source/{i}_{k}.png" for k in range(2 if several and i % 2 else 1)]
        for k, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture(*((96, 48) if k else (64, 64)), 10 * i + k).save(folder / name)
        (folder / "target").mkdir(exist_ok=True)
        picture(64, 64, 100 + i).save(folder / f"target/{i}.png")
        told = f"make the {('circle', 'large green square')[i % 2]} blue"
        rows.append({"file_path": f"target/{i}.png", "source_file_path": names, "text": told, "type": "image"})
    table = folder / "metadata.json"
    table.write_text(json.dumps(rows), encoding="utf-8")
    return table


def brightness(images: torch.Tensor, prompts: list[str], sources: list[list[torch.Tensor]]) -> torch.Tensor:
    """A scorer of edits: how much brighter than its first source each image is."""
    return torch.stack([image.mean() - row[0].mean() for image, row in zip(images, sources, strict=True)])
