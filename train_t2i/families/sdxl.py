"""SDXL: a UNet told by two CLIP text encoders, a pooled text vector and the image's size.

Shapes: x_t (B, 4, H, W); tokens (B, 77, D1 + D2); pooled (B, P2); size ids (B, 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from train_t2i.errors import UserError
from train_t2i.families import sdxl_file
from train_t2i.families.base import Cond, FamilyOptions, Source, classifier_free
from train_t2i.families.loading import load_autoencoder, load_pipeline, load_tiny, told
from train_t2i.schedule import EpsilonVP, shift_time

TAKES = "a hub id, a diffusers pipeline folder, or a single .safetensors file"
ENCODERS = ("text_encoder", "text_encoder_2")


class SDXL:
    """SDXL and its fine-tunes.

    ``tiny`` is an ``AutoencoderTiny`` (TAESDXL) whose decoder serves rewards.  The VAE stays fp32: SDXL's own overflows in
    half precision.
    """

    lora_targets: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    )  # fmt: skip
    policy_targets: tuple[str, ...] = ()
    denoiser_name = "unet"
    block_names: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")
    latent_channels = 4
    max_side_px = None
    text_length = max_text_length = 77

    def __init__(
        self,
        pipe: Any,
        load_unet: Callable[[torch.dtype], nn.Module],
        *,
        tiny: Any = None,
        shift: float = 1.0,
        checkpoint_decoder: bool = False,
    ) -> None:
        """``pipe`` holds text encoders, tokenizers, VAE and scheduler config; ``load_unet(dtype)`` makes a denoiser."""
        self.device = torch.device("cpu")
        self.pipe, self.tiny, self._load_unet = pipe, tiny, load_unet
        self.vae = pipe.vae.float()
        pipe.vae = None  # one VAE is kept, ours
        for part in self._parts():
            part.requires_grad_(False).eval()
        if checkpoint_decoder:
            for decoder in filter(None, (self.vae, self.tiny)):
                decoder.enable_gradient_checkpointing()
        self.vae_factor = self.size_multiple = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.path = EpsilonVP(_alphas_cumprod(pipe), shift=shift)

    @classmethod
    def from_pretrained(cls, model: str, options: FamilyOptions) -> SDXL:
        """From a hub id, a pipeline folder or a single file.  Raises UserError."""
        pipe = _load_pipeline(model, options)
        if options.vae:
            pipe.vae = _load_vae(options.vae)
        return cls(
            pipe,
            lambda dtype: _load_unet(model, dtype),
            tiny=load_tiny(options.tiny_vae, cls.latent_channels),
            shift=1.0 if options.shift is None else options.shift,
            checkpoint_decoder=options.checkpoint_decoder,
        )

    def _parts(self) -> list[nn.Module]:
        return [m for m in (self.pipe.text_encoder, self.pipe.text_encoder_2, self.vae, self.tiny) if m is not None]

    def load(self, dtype: torch.dtype) -> nn.Module:
        return self._load_unet(dtype).requires_grad_(False).train(False)

    def lora_state(self, state: dict[str, Tensor], net: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        return StableDiffusionXLPipeline.lora_state_dict(state, unet_config=net.config)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], negative: str | None = None, sources: Sequence[Sequence[Source]] = ()
    ) -> Cond:
        """Empty negative text means zeros, as the published pipeline does (``force_zeros_for_empty_prompt``)."""
        if self.pipe.text_encoder is None:
            raise RuntimeError("the text encoders were not loaded")
        guided = negative is not None
        tokens, neg_tokens, pooled, neg_pooled = self.pipe.encode_prompt(
            list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative] * len(prompts) if negative else None,
        )
        return Cond(tokens, pooled, negative=Cond(neg_tokens, neg_pooled) if guided else None)

    def complete(self, cond: Cond) -> Cond:
        return cond

    def training_time(self, rank: Tensor, latent_size: tuple[int, int]) -> Tensor:
        return shift_time(rank, self.path.shift)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2] * self.vae_factor, x_t.shape[-1] * self.vae_factor
        # SDXL (arXiv 2307.01952) section 2.2: original size, crop corner, target size
        size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).to(x_t.device, non_blocking=True)
        told = {"text_embeds": cond.pooled, "time_ids": size.expand(len(x_t), 6)}
        levels = self.path.levels(t)
        return net(x_t, levels, encoder_hidden_states=cond.tokens, added_cond_kwargs=told, return_dict=False)[0]

    def guide(self, positive: Tensor, negative: Tensor, weight: float | Tensor) -> Tensor:
        return classifier_free(positive, negative, weight)

    def decode(self, z: Tensor, *, fast: bool = False) -> Tensor:
        coder = self.tiny if fast and self.tiny is not None else self.vae
        config = coder.config
        images = coder.decode(z.float() / config.scaling_factor + (config.shift_factor or 0.0), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        config = self.vae.config
        mean = self.vae.encode(images.float() * 2 - 1).latent_dist.mode()
        return (mean - (config.shift_factor or 0.0)) * config.scaling_factor

    def to(self, device: torch.device) -> SDXL:
        self.device = device
        for part in self._parts():
            part.to(device)
        return self

    def pipeline(self, net: Any, scheduler: Any, latent_size: tuple[int, int]) -> StableDiffusionXLPipeline:
        height, width = latent_size
        if height == width:
            net.register_to_config(sample_size=height)
        parts = self.pipe.components | {"vae": self.vae, "unet": net, "scheduler": scheduler}
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)

    def call_options(self, cfg: float) -> dict[str, Any]:
        return {"guidance_scale": cfg}


def _is_file(model: str) -> bool:
    return FilePath(model).is_file()


def _load_pipeline(model: str, options: FamilyOptions) -> Any:
    """Everything but the UNet, and without ``options.encoders`` but the text encoders."""
    left_out = ("unet", *(() if options.encoders else ENCODERS))
    if not _is_file(model):
        with told(model, "--pretrained-model", TAKES):
            return load_pipeline(StableDiffusionXLPipeline, model, options.dtype, left_out, add_watermarker=False)
    with told(model, "--pretrained-model", TAKES):
        pipe = _pipeline_of_file(model, options.dtype, dict.fromkeys(left_out))
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _pipeline_of_file(file: str, dtype: torch.dtype, absent: dict[str, None]) -> Any:
    sdxl_file.check_file(file)
    first, second = sdxl_file.tokenizers()
    with sdxl_file.configs() as folder:
        return StableDiffusionXLPipeline.from_single_file(
            file, config=folder, tokenizer=first, tokenizer_2=second, scheduler=sdxl_file.scheduler(),
            dtype=dtype, add_watermarker=False, **absent,
        )  # fmt: skip


def _load_unet(model: str, dtype: torch.dtype) -> nn.Module:
    with told(model, "--pretrained-model", TAKES):
        if _is_file(model):
            with sdxl_file.configs() as folder:
                return UNet2DConditionModel.from_single_file(model, config=folder, subfolder="unet", dtype=dtype)
        return UNet2DConditionModel.from_pretrained(model, subfolder="unet", dtype=dtype)


def _load_vae(source: str) -> Any:
    if not _is_file(source):
        return load_autoencoder(AutoencoderKL, source, "--vae", SDXL.latent_channels)
    with told(source, "--vae", TAKES), sdxl_file.configs() as folder:
        return AutoencoderKL.from_single_file(source, config=folder, subfolder="vae", dtype=torch.float32)


def _alphas_cumprod(pipe: Any) -> Tensor:
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if scheduler.config.prediction_type != "epsilon":
        raise UserError(
            f"--pretrained-model: predicts {scheduler.config.prediction_type}, only epsilon is supported",
            "use a noise-predicting SDXL",
        )
    return scheduler.alphas_cumprod.float()
