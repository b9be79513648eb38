"""SD3 and SD3.5 (arXiv 2403.03206): a transformer told by two CLIP text encoders and T5, and a pooled text vector.

Shapes: x_t (B, 16, H, W); tokens (B, 77 + L, D): CLIP's, padded with zeros to T5's width, then T5's L; pooled (B, P).
T5's padding conditions the network, so no token is masked.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from train_t2i.families.base import Cond
from train_t2i.families.flow import FlowFamily

IMAGE_ATTENTION = ("to_q", "to_k", "to_v", r"to_out\.0")
NETWORK_TIME = 1000.0  # the network's unit of time


class SD3(FlowFamily):
    Pipeline = StableDiffusion3Pipeline
    Transformer = SD3Transformer2DModel
    Autoencoder = AutoencoderKL
    encoder_names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    block_names = ("JointTransformerBlock",)
    default_text_length, max_text_length = 256, 512  # of T5
    evenly_spaced = False

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention, also the second one that the first blocks of SD3.5-medium have.

        Nothing reads the text that leaves the last block, so the layer of its queries would never learn.
        """
        last = self.config["num_layers"] - 1
        asks = rf"transformer_blocks\.(?!{last}\.)\d+\.attn\.add_q_proj"
        text = (r"attn\.add_k_proj", r"attn\.add_v_proj", r"attn\.to_add_out", asks)
        second = (
            tuple(rf"attn2\.{name}" for name in IMAGE_ATTENTION) if self.config.get("dual_attention_layers") else ()
        )
        return (*(rf"attn\.{name}" for name in IMAGE_ATTENTION), *text, *second)

    @property
    def max_side_px(self) -> int:
        """The side of its table of positions, which has a row a token."""
        return self.config["pos_embed_max_size"] * self.size_multiple

    def _encode(self, prompts: list[str]) -> Cond:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts, prompts, prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )  # fmt: skip
        return Cond(tokens, pooled)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(
            x_t, timestep=t.float() * NETWORK_TIME, encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled,
            return_dict=False,
        )[0]  # fmt: skip
