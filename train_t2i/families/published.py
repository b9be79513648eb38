"""The published models' architectures: enough to build them without weights, and to reckon with their sizes.

Source of the numbers: the config.json files of each repository on the Hugging Face hub.  Only what differs from the
defaults of diffusers' and transformers' classes, which are those of the first model of each kind, is written out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train_t2i.families.sdxl_file import CLIP_G, CLIP_L, UNET, VAE

Config = dict[str, Any]
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
T5_XXL: Config = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
QWEN_2_5_VL_7B: Config = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}  # fmt: skip
VAE_16: Config = {  # SD3's and FLUX.1's
    **VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
CLIP_L_TEXT = ("CLIPTextModel", {**CLIP, **CLIP_L})
CLIP_L_PROJECTED = ("CLIPTextModelWithProjection", {**CLIP, **CLIP_L})
CLIP_G_PROJECTED = ("CLIPTextModelWithProjection", {**CLIP, **CLIP_G})
T5 = ("T5EncoderModel", T5_XXL)


@dataclass(frozen=True)
class Published:
    """One model: its denoiser's config, its VAE's, its text encoders as (transformers class, config)."""

    family: str
    repository: str
    denoiser: Config
    vae: Config
    encoders: tuple[tuple[str, Config], ...]
    scheduler: Config = field(default_factory=dict)
    num_sources: int = 1  # of a row, for a family that edits


def _sd3(repository: str, layers: int, **more: Any) -> Published:
    denoiser = {
        "sample_size": 128, "in_channels": 16, "num_layers": layers, "attention_head_dim": 64,
        "num_attention_heads": layers, "joint_attention_dim": 4096, "caption_projection_dim": 64 * layers,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192, **more,
    }  # fmt: skip
    encoders = (CLIP_L_PROJECTED, CLIP_G_PROJECTED, T5)
    return Published("sd3", f"stabilityai/{repository}", denoiser, VAE_16, encoders, {"shift": 3.0})


QWEN_IMAGE: Config = {
    "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


def _qwen(family: str, repository: str, **more: Any) -> Published:
    scheduler = {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    encoders = (("Qwen2_5_VLForConditionalGeneration", QWEN_2_5_VL_7B),)
    return Published(family, f"Qwen/{repository}", {**QWEN_IMAGE, **more}, {}, encoders, scheduler)


DYNAMIC: Config = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256}
PUBLISHED: dict[str, Published] = {
    "sdxl": Published(
        "sdxl", "stabilityai/stable-diffusion-xl-base-1.0", UNET, VAE, (CLIP_L_TEXT, CLIP_G_PROJECTED)
    ),
    "sd3_medium": _sd3("stable-diffusion-3-medium-diffusers", 24),
    "sd35_medium": _sd3(
        "stable-diffusion-3.5-medium", 24, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ),
    "sd35_large": _sd3("stable-diffusion-3.5-large", 38, qk_norm="rms_norm"),
    "flux_dev": Published(
        "flux", "black-forest-labs/FLUX.1-dev",
        {
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, (CLIP_L_TEXT, T5),
        {**DYNAMIC, "max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0},
    ),
    "qwen_image": _qwen("qwen_image", "Qwen-Image"),
    "qwen_image_edit": _qwen("qwen_image_edit", "Qwen-Image-Edit"),
    "qwen_image_edit_2509": _qwen("qwen_image_edit_plus", "Qwen-Image-Edit-2509"),
    "qwen_image_edit_2511": _qwen("qwen_image_edit_plus", "Qwen-Image-Edit-2511", zero_cond_t=True),
}  # fmt: skip
FIRST_OF = {  # family -> model
    "sdxl": "sdxl", "sd3": "sd3_medium", "flux": "flux_dev", "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image_edit", "qwen_image_edit_plus": "qwen_image_edit_2509",
}  # fmt: skip
