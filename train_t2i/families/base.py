"""What a model family is: everything that differs between architectures, behind five calls.

Shapes: B rows; C H W latent; L text tokens of width D; P pooled width; t (B,) fp32 in [0, 1]; images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_t2i.schedule import Path, per_row


@dataclass(frozen=True)
class Source:
    """An image that a row's edit starts from, at the sizes of its two readers."""

    pixels: Tensor  # (3, h, w) uint8: what the VAE encodes
    seen: Tensor  # (3, h', w') uint8: what the text encoder sees


def alike(sources: Sequence[Sequence[Source]], count: int) -> list[list[int]]:
    """The rows 0 .. count - 1 in groups whose sources have the same sizes, in order: each group can be one batch."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row in range(count):
        told = sources[row] if sources else ()
        sizes = tuple((*source.pixels.shape, *source.seen.shape) for source in told)
        groups.setdefault(sizes, []).append(row)
    return list(groups.values())


@dataclass(frozen=True)
class Cond:
    """Everything a network is told besides x_t and t."""

    tokens: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, L)
    negative: Cond | None = None  # what classifier-free guidance moves away from
    guidance: Tensor | None = None  # (B,) embedded guidance
    context: tuple[Tensor, ...] = ()  # (B, N, D) packed latents of each source, for edit models
    shapes: tuple[tuple[int, int, int], ...] = ()  # and their sizes in patches: frames, rows, columns

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Rows of several conditionings, one after the other; shorter texts are padded and masked."""

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            given = [part for part in parts if part is not None]
            return torch.cat(given) if given else None

        tokens, mask = joined_tokens([(c.tokens, c.mask) for c in conds])
        negatives = [c.negative for c in conds if c.negative is not None]
        if any(c.shapes != conds[0].shapes for c in conds):
            raise ValueError("rows of one batch have sources of the same sizes")
        return Cond(
            tokens,
            joined([c.pooled for c in conds]),
            mask,
            Cond.cat(negatives) if negatives else None,
            joined([c.guidance for c in conds]),
            tuple(torch.cat(parts) for parts in zip(*(c.context for c in conds), strict=True)),
            conds[0].shapes,
        )

    def with_negative(self) -> Cond:
        """(2B): the negative rows, then the positive ones, for guidance in one network call."""
        if self.negative is None:
            raise ValueError("classifier-free guidance needs a negative conditioning")
        tokens, mask = joined_tokens([(self.negative.tokens, self.negative.mask), (self.tokens, self.mask)])
        return replace(
            self,
            tokens=tokens,
            pooled=_stack(self.negative.pooled, self.pooled),
            mask=mask,
            negative=None,
            guidance=_stack(self.guidance, self.guidance),
            context=tuple(torch.cat([c, c]) for c in self.context),
        )

    def take(self, rows: Tensor) -> Cond:
        """Some ``rows`` (n,) int64, without their negative."""

        def taken(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[rows]

        return replace(
            self, tokens=self.tokens[rows], pooled=taken(self.pooled), mask=taken(self.mask), negative=None,
            guidance=taken(self.guidance), context=tuple(part[rows] for part in self.context),
        )  # fmt: skip

    def expand(self, rows: int) -> Cond:
        """One row, seen ``rows`` times; nothing is copied."""

        def seen(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.expand(rows, *part.shape[1:])

        return replace(
            self, tokens=self.tokens.expand(rows, -1, -1), pooled=seen(self.pooled), mask=seen(self.mask),
            guidance=seen(self.guidance),
        )  # fmt: skip


def joined_tokens(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """((B1, L1, D), (B1, L1) mask or None), ... -> ((B, L, D), (B, L)) of the longest text, zeros behind the others.

    No mask stays no mask where nothing is padded: a network then sees what it sees of each part alone.
    """
    longest = max(tokens.shape[1] for tokens, _ in parts)
    if all(mask is None and tokens.shape[1] == longest for tokens, mask in parts):
        return torch.cat([tokens for tokens, _ in parts]), None
    padded, masks = [], []
    for tokens, mask in parts:
        missing = longest - tokens.shape[1]
        padded.append(F.pad(tokens, (0, 0, 0, missing)))
        attended = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        masks.append(F.pad(attended, (0, missing)))
    return torch.cat(padded), torch.cat(masks)


def _stack(negative: Tensor | None, positive: Tensor | None) -> Tensor | None:
    if negative is None or positive is None:
        return None
    return torch.cat([negative, positive])


def classifier_free(positive: Tensor, negative: Tensor, weight: float | Tensor) -> Tensor:
    """(B, C, H, W): uncond + w (cond - uncond); ``weight`` is a number or (B,).  Source: arXiv 2207.12598, eq. 6."""
    return negative + (per_row(weight, positive) if isinstance(weight, Tensor) else weight) * (positive - negative)


@dataclass(frozen=True)
class FamilyOptions:
    """How a family is built on a model; what an architecture does not have is left at its default."""

    dtype: torch.dtype = torch.float32  # of text encoders and frozen weights
    vae: str | None = None  # instead of the model's own
    tiny_vae: str | None = None  # AutoencoderTiny whose decoder serves rewards
    shift: float | None = 1.0  # of the student's grid; None: the model's own at this size
    size_px: tuple[int, int] = (1024, 1024)  # (height, width): decides a resolution-dependent shift
    text_length: int | None = None  # tokens of the longest text; None: the pipeline's own
    guidance: float = 3.5  # what a network with a guidance embedding is told
    encoders: bool = True  # False: no text encoder is loaded, the prompts come from a cache
    checkpoint_decoder: bool = False


class Family(Protocol):
    """One architecture with its text encoders and VAE.  All modules it owns are frozen."""

    path: Path
    lora_targets: tuple[str, ...]  # expressions for the end of a layer's name, from a dot on
    policy_targets: tuple[str, ...]  # of them, for a network whose head says a policy (ArcFlow); none: it cannot
    denoiser_name: str  # in its pipeline: of the network's folder, and before the names of a LoRA
    block_names: tuple[str, ...]  # class names of the repeated blocks: sharding and checkpointing units
    latent_channels: int
    vae_factor: int  # pixels a latent cell, along one side
    size_multiple: int  # images are multiples of so many pixels
    max_side_px: int | None  # no side of an image is longer; None: no table of positions ends
    text_length: int  # tokens of the longest text
    max_text_length: int  # that its pipeline can be told

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The bare frozen denoiser."""
        ...

    def lora_state(self, state: dict[str, Tensor], net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """A LoRA in any names that the family's pipeline reads -> in diffusers' own, and the alphas that stand beside it."""
        ...

    def encode(self, prompts: Sequence[str], negative: str | None, sources: Sequence[Sequence[Source]] = ()) -> Cond:
        """Conditioning of a batch; with ``negative`` (its text) the result can be guided; ``sources`` are each row's."""
        ...

    def complete(self, cond: Cond) -> Cond:
        """A conditioning that came from a cache with what is told beside the text: a guidance number."""
        ...

    def training_time(self, rank: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """(B,) shares of all noise levels that are lower -> (B,) times to train at, for latents of (H, W)."""
        ...

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W): the network's raw output; packing and the network's unit of time live here."""
        ...

    def guide(self, positive: Tensor, negative: Tensor, weight: float | Tensor) -> Tensor:
        """(B, C, H, W) network outputs with and without the prompt -> the guided one, as the family's pipeline does."""
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

    def pipeline(self, net: nn.Module, scheduler: Any, latent_size: tuple[int, int]) -> Any:
        """The stock pipeline around a denoiser; a call that names no size makes images of ``latent_size`` cells, if it can."""
        ...

    def call_options(self, cfg: float) -> dict[str, Any]:
        """What a call of that pipeline is told beside prompt, steps and size, for guidance ``cfg``."""
        ...
