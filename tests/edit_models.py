"""Tiny random Qwen-Image-Edit models in the true pipeline format, with sources to show them."""

from __future__ import annotations

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
