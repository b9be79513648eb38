"""Tiny random SD3, FLUX.1 and Qwen-Image in the true pipeline formats: their tokenizers and classes are those of the tiny world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from shapes import qwen_autoencoder
from shapes.flow_models import PIPELINES, FlowRecipe, assemble, new_transformer
from shapes.long_text_encoders import QwenTextRecipe, T5Recipe, new_qwen_vl, new_t5
from shapes.tokenizer import new_qwen_tokenizer, new_t5_tokenizer, new_tokenizer

FAMILIES = ("sd3", "flux", "qwen_image")
T5_WIDTH, CLIP_WIDTH, QWEN_WIDTH = 64, 32, 32
RECIPES = {
    "sd3": FlowRecipe("sd3", 0, width=32, heads=2, layers=2),
    "flux": FlowRecipe("flux", 0, width=32, heads=2, layers=1, single_layers=2),
    "qwen_image": FlowRecipe("qwen_image", 0, width=32, heads=2, layers=2),
}
# what a pipeline's call is told beside the prompt, and our words for the same
CALLS: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 4.0, "max_sequence_length": 24},
    "flux": {"guidance_scale": 3.5, "max_sequence_length": 24},
    "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": " ", "max_sequence_length": 24},
}
CFG = {"sd3": 4.0, "flux": 1.0, "qwen_image": 4.0}
NEGATIVE = {"sd3": "", "flux": None, "qwen_image": " "}


def clip(kind: Any) -> Any:
    tokenizer = new_tokenizer()
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=32, projection_dim=CLIP_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        scaling_factor=0.8, shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def parts(family: str) -> dict[str, Any]:
    """The models of a pipeline, with random weights everywhere."""
    recipe = RECIPES[family]
    if family == "qwen_image":
        text = new_qwen_vl(QwenTextRecipe(width=QWEN_WIDTH, heads=1, feed_forward=32, layers=2), new_qwen_tokenizer())
        vae: Any = qwen_autoencoder.new_autoencoder(
            qwen_autoencoder.QwenAutoencoderRecipe(base_width=4, width_factors=(1, 1, 2, 2))
        )
        made = {"text_encoder": text, "vae": vae, "transformer": new_transformer(recipe, QWEN_WIDTH, 0)}
    else:
        t5 = new_t5(T5Recipe(width=T5_WIDTH, head_width=8, heads=2, feed_forward=32, layers=2), len(new_t5_tokenizer()))
        clips = (
            {"text_encoder": clip(CLIPTextModelWithProjection), "text_encoder_2": clip(CLIPTextModelWithProjection), "text_encoder_3": t5}
            if family == "sd3"
            else {"text_encoder": clip(CLIPTextModel), "text_encoder_2": t5}
        )  # fmt: skip
        pooled = CLIP_WIDTH * (2 if family == "sd3" else 1)
        made = {**clips, "vae": autoencoder(), "transformer": new_transformer(recipe, T5_WIDTH, pooled)}
    for module in made.values():
        for parameter in module.parameters():  # zeros would hide what feeds them
            if float(parameter.detach().abs().max()) == 0.0:
                torch.nn.init.normal_(parameter, std=0.05)
    return made


def save_flow(folder: Path, family: str, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        assemble(family, parts(family), folder)
    return folder


def load_pipeline(folder: Path, family: str) -> Any:
    """The stock pipeline in fp32, silent."""
    pipe = PIPELINES[family].from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
