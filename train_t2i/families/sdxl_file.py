"""SDXL in one .safetensors file: weights alone.  What they are the weights of is published, and stands here.

Source of the numbers: the configs of stabilityai/stable-diffusion-xl-base-1.0.  With them diffusers asks no hub.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import EulerDiscreteScheduler
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

UNET: dict[str, Any] = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "scaling_factor": 0.13025, "sample_size": 1024,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip
NUM_MERGES = 49152 - 256 - 2  # CLIP's vocabulary: twice the 256 bytes, these merges, two special tokens

WEIGHTS_OF = {  # one key of each part that the file must hold
    "the denoiser": "model.diffusion_model.input_blocks.0.0.weight",
    "the first text encoder": "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "the second text encoder": "conditioner.embedders.1.model.positional_embedding",
    "the VAE": "first_stage_model.decoder.conv_in.weight",
}
OTHER_PREDICTIONS = ("v_pred", "edm_mean")  # keys that fine-tunes with another path carry


@contextmanager
def configs() -> Iterator[str]:
    """A folder of the published configs, as long as it is needed."""
    text = {"max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    parts = {
        "unet": ("diffusers", {"_class_name": "UNet2DConditionModel", **UNET}),
        "vae": ("diffusers", {"_class_name": "AutoencoderKL", **VAE}),
        "text_encoder": ("transformers", {"_class_name": "CLIPTextModel", **text, **CLIP_L}),
        "text_encoder_2": ("transformers", {"_class_name": "CLIPTextModelWithProjection", **text, **CLIP_G}),
    }
    index = {name: (library, config["_class_name"]) for name, (library, config) in parts.items()}
    index |= {"tokenizer": ("transformers", "CLIPTokenizer"), "tokenizer_2": ("transformers", "CLIPTokenizer")}
    index |= {"scheduler": ("diffusers", "EulerDiscreteScheduler")}
    with tempfile.TemporaryDirectory() as folder:
        model = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **index}
        (Path(folder) / "model_index.json").write_text(json.dumps(model), encoding="utf-8")
        for name, (_, config) in parts.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULER)


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """CLIP's, from the table of merges that open_clip carries; SDXL's second pads with "!" (token 0)."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    first, second = (CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77) for _ in range(2))
    second.pad_token = "!"  # noqa: S105
    return first, second


def check_file(file: str) -> None:
    """Raises ValueError where the file is no whole, noise-predicting SDXL base model in the published layout."""
    try:
        with safe_open(file, "pt") as weights:
            keys = set(weights.keys())
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if missing := [part for part, key in WEIGHTS_OF.items() if key not in keys]:
        raise ValueError(f"holds no weights of {', '.join(missing)} in SDXL's single-file layout")
    if other := [key for key in OTHER_PREDICTIONS if key in keys]:
        raise ValueError(f"its key {other[0]} says that it does not predict noise")
