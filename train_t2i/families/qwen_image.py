"""Qwen-Image (arXiv 2508.02324): a transformer told by Qwen2.5-VL inside a template; padding is masked.

Shapes: x_t (B, 16, H, W), packed to (B, H/2 * W/2, 64); tokens (B, L, D) without the template's head; mask (B, L) or
None; the VAE's tensors are (B, C, 1, H, W): one frame of a video.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, FamilyOptions, classifier_free
from train_t2i.families.flow import PATCH, TIME_EMBEDDING, FlowFamily, pack, told_time, unpack


class QwenImage(FlowFamily):
    Pipeline = QwenImagePipeline
    Transformer = QwenImageTransformer2DModel
    Autoencoder = AutoencoderKLQwenImage
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    block_names = ("QwenImageTransformerBlock",)
    default_text_length, max_text_length = 512, 1024

    def __init__(self, pipe: Any, config: dict[str, Any], load_net: Any, options: FamilyOptions) -> None:
        if options.tiny_vae:
            raise UserError("--tiny-vae: Qwen-Image has no tiny decoder", "leave it out")
        super().__init__(pipe, config, load_net, options)
        single_frame(self.vae)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention and feed-forward, but in the last block what only its text output needs, which nothing reads."""
        image = ("to_q", "to_k", "to_v", r"to_out\.0", "add_k_proj", "add_v_proj")
        text = (rf"{self._with_text}attn\.{name}" for name in ("add_q_proj", "to_add_out"))
        return (*(rf"attn\.{name}" for name in image), *text, *self._feed_forward)

    @property
    def policy_targets(self) -> tuple[str, ...]:
        return (*self._feed_forward, *TIME_EMBEDDING)

    @property
    def _with_text(self) -> str:
        """The blocks whose text output is read: all but the last."""
        return rf"transformer_blocks\.(?!{self.config['num_layers'] - 1}\.)\d+\."

    @property
    def _feed_forward(self) -> tuple[str, ...]:
        names = (r"net\.0\.proj", r"net\.2")
        return (*(rf"img_mlp\.{name}" for name in names), *(rf"{self._with_text}txt_mlp\.{name}" for name in names))

    def _encode(self, prompts: list[str]) -> Cond:
        tokens, mask = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_length)
        return Cond(tokens, mask=None if mask is None else mask.bool())

    def call_options(self, cfg: float) -> dict[str, Any]:
        guided = {"true_cfg_scale": cfg, "negative_prompt": ""} if cfg > 1 else {"true_cfg_scale": 1.0}
        return {"max_sequence_length": self.text_length, **guided}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Source latents follow the noisy ones; what the network says of them is not read."""
        height, width = x_t.shape[-2:]
        tokens = pack(x_t)
        out = net(
            torch.cat([tokens, *cond.context], dim=1), timestep=told_time(t, cond.tokens), encoder_hidden_states=cond.tokens,
            encoder_hidden_states_mask=cond.mask, img_shapes=[[(1, height // PATCH, width // PATCH), *cond.shapes]] * len(x_t),
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(out[:, : tokens.shape[1]], height, width)

    def guide(self, positive: Tensor, negative: Tensor, weight: float | Tensor) -> Tensor:
        """Classifier-free guidance whose tokens keep the length that they have with the prompt, as its pipeline does."""
        height, width = positive.shape[-2:]
        told, guided = pack(positive), pack(classifier_free(positive, negative, weight))
        return unpack(guided * (told.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), height, width)

    # -- images --------------------------------------------------------------------------------------------------

    def _vae_factor(self) -> int:
        return 2 ** len(self.vae.temperal_downsample)

    def _checkpoint_decoder(self) -> None:
        """diffusers does not offer it for this VAE: each block of the decoder is run again in backward."""
        for block in self.vae.decoder.up_blocks:
            block.forward = _recomputed(block.forward)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latent channels, (1, C, 1, 1) each."""
        config = self.vae.config
        mean, std = torch.tensor([config.latents_mean, config.latents_std]).to(like.device, non_blocking=True)
        return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)

    def decode(self, z: Tensor, *, fast: bool = False) -> Tensor:
        """The decoder without its cache of earlier frames: a single frame has none, and the result is the same."""
        mean, std = self._moments(z)
        frames = (z.float() * std + mean).unsqueeze(2).to(self.vae.dtype)
        images = self.vae.decoder(self.vae.post_quant_conv(frames))[:, :, 0]
        return (images.float().clamp(-1, 1) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        mean, std = self._moments(images)
        frames = (images * 2 - 1).unsqueeze(2).to(self.vae.dtype)
        return (self.vae.encode(frames).latent_dist.mode()[:, :, 0].float() - mean) / std


def single_frame(vae: nn.Module) -> None:
    """Have the causal convolutions of ``vae`` see one frame alone: a third of the work, the same result.

    Of a kernel of three frames only the last falls on it; the others fall on the zeros before the first frame.
    """
    for conv in vae.modules():
        if isinstance(conv, QwenImageCausalConv3d):
            conv.forward = _on_one_frame(conv)


def _on_one_frame(conv: Any) -> Any:
    width_pad, _, height_pad, *_ = conv._padding

    def run(x: Tensor, cache_x: None = None) -> Tensor:
        weight = conv.weight[:, :, -1]
        return F.conv2d(x[:, :, 0], weight, conv.bias, conv.stride[1:], (height_pad, width_pad)).unsqueeze(2)

    return run


def _recomputed(forward: Any) -> Any:
    def run(x: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x, *rest)
        return checkpoint(forward, x, *rest, use_reentrant=False)

    return run
