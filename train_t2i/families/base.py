"""What a model family is: everything that differs between architectures, behind five calls.

Shapes: B rows; C H W latent; L text tokens of width D; P pooled width; t (B,) fp32 in [0, 1]; images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from train_t2i.schedule import Path


@dataclass(frozen=True)
class Cond:
    """Everything a network is told besides x_t and t."""

    tokens: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, L)
    negative: Cond | None = None  # what classifier-free guidance moves away from
    guidance: Tensor | None = None  # (B,) embedded guidance
    context: tuple[Tensor, ...] = ()  # source latents of edit models
    shapes: tuple = ()  # and their sizes

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Rows of several conditionings, one after the other."""

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            given = [part for part in parts if part is not None]
            return torch.cat(given) if given else None

        negatives = [c.negative for c in conds if c.negative is not None]
        return Cond(
            torch.cat([c.tokens for c in conds]),
            joined([c.pooled for c in conds]),
            joined([c.mask for c in conds]),
            Cond.cat(negatives) if negatives else None,
            joined([c.guidance for c in conds]),
        )

    def with_negative(self) -> Cond:
        """(2B): the negative rows, then the positive ones, for guidance in one network call."""
        if self.negative is None:
            raise ValueError("classifier-free guidance needs a negative conditioning")
        return replace(
            self,
            tokens=torch.cat([self.negative.tokens, self.tokens]),
            pooled=_stack(self.negative.pooled, self.pooled),
            mask=_stack(self.negative.mask, self.mask),
            negative=None,
            guidance=_stack(self.guidance, self.guidance),
            context=tuple(torch.cat([c, c]) for c in self.context),
        )


def _stack(negative: Tensor | None, positive: Tensor | None) -> Tensor | None:
    if negative is None or positive is None:
        return None
    return torch.cat([negative, positive])


class Family(Protocol):
    """One architecture with its text encoders and VAE.  All modules it owns are frozen."""

    path: Path
    lora_targets: tuple[str, ...]
    block_names: tuple[str, ...]  # class names of the repeated blocks: sharding and checkpointing units
    latent_channels: int
    vae_factor: int  # pixels a latent cell, along one side
    text_length: int  # tokens that a prompt is cut or filled up to

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The bare frozen denoiser."""
        ...

    def encode(self, prompts: Sequence[str], negative: str | None) -> Cond:
        """Conditioning of a batch; with ``negative`` (its text) the result can be guided."""
        ...

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W): the network's raw output; packing and the network's unit of time live here."""
        ...

    def decode(self, z: Tensor, *, fast: bool = False) -> Tensor:
        """(B, C, H, W) latents -> images, differentiable; ``fast`` takes the tiny decoder where there is one."""
        ...

    def to_latents(self, images: Tensor) -> Tensor:
        """Images -> (B, C, H, W) scaled latents, no graph."""
        ...

    def to(self, device: torch.device) -> Family:
        """Move the text encoders and decoders."""
        ...
