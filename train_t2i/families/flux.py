"""FLUX.1: a transformer told by T5, a pooled CLIP vector and, in the guidance-distilled dev model, a guidance number.

Shapes: x_t (B, 16, H, W), packed to (B, H/2 * W/2, 64); tokens (B, L, D) of T5, whose padding conditions the network;
pooled (B, P) of CLIP; position ids (L, 3) of the text (all zero) and (H/2 * W/2, 3) of the image (0, row, column).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, FamilyOptions
from train_t2i.families.flow import PATCH, TIME_EMBEDDING, FlowFamily, pack, told_time, unpack

FEED_FORWARD = (
    r"ff\.net\.0\.proj", r"ff\.net\.2", r"ff_context\.net\.0\.proj", r"ff_context\.net\.2",
    "proj_mlp", r"single_transformer_blocks\.\d+\.proj_out",
)  # fmt: skip


class FLUX(FlowFamily):
    Pipeline = FluxPipeline
    Transformer = FluxTransformer2DModel
    Autoencoder = AutoencoderKL
    encoder_names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    block_names = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    default_text_length = max_text_length = 512

    def __init__(self, pipe: Any, config: dict[str, Any], load_net: Any, options: FamilyOptions) -> None:
        if options.guidance != FamilyOptions.guidance and not config.get("guidance_embeds"):
            raise UserError(
                "--guidance-embed does nothing: this FLUX.1 is not told its guidance (schnell)", "leave it out"
            )
        super().__init__(pipe, config, load_net, options)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention and feed-forward of every block; ``proj_out`` of the single blocks, not the network's own."""
        attention = ("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        return (*(rf"attn\.{name}" for name in attention), *FEED_FORWARD)

    @property
    def policy_targets(self) -> tuple[str, ...]:
        return (*FEED_FORWARD, *TIME_EMBEDDING)

    def lora_state(self, state: dict[str, Tensor], net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        return self.Pipeline.lora_state_dict(state, return_alphas=True)

    def _encode(self, prompts: list[str]) -> Cond:
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompts, prompts, device=self.device, max_sequence_length=self.text_length
        )
        return Cond(tokens, pooled)

    def complete(self, cond: Cond) -> Cond:
        return self.told_guidance(cond, self.options.guidance)

    def told_guidance(self, cond: Cond, guidance: float | Tensor) -> Cond:
        """``cond`` with the number, or (B,) numbers, that a guidance-distilled network is told; others take none."""
        if not self.config.get("guidance_embeds"):
            return cond
        told = torch.as_tensor(guidance, dtype=torch.float32).to(cond.tokens.device, non_blocking=True)
        return replace(cond, guidance=told.expand(len(cond.tokens)))

    def call_options(self, cfg: float) -> dict[str, Any]:
        """Its ``guidance_scale`` is the number that the network is told; true guidance has a name of its own."""
        told = self.options.guidance if self.config.get("guidance_embeds") else 0.0
        guided = {"true_cfg_scale": cfg, "negative_prompt": ""} if cfg > 1 else {}
        return {"guidance_scale": told, "max_sequence_length": self.text_length, **guided}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2:]
        out = net(
            pack(x_t), timestep=told_time(t, cond.tokens), encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled,
            guidance=cond.guidance, txt_ids=x_t.new_zeros(cond.tokens.shape[1], 3),
            img_ids=position_ids(height // PATCH, width // PATCH, x_t.device), return_dict=False,
        )[0]  # fmt: skip
        return unpack(out, height, width)


def position_ids(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3) fp32: 0, row and column of each token."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1).float()
