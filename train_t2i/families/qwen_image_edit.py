"""Qwen-Image-Edit and Qwen-Image-Edit-Plus (2509, 2511): Qwen-Image that is shown source images twice.

The text encoder sees them in its template; the network reads their latents as tokens behind the noisy ones.
Shapes: tokens (B, L, D) without the template's head; a source's latents (B, N, 64), N = h/16 * w/16 of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.modular_pipelines.qwenimage.prompt_templates import QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train_t2i.errors import UserError
from train_t2i.families.base import Cond, FamilyOptions, Source, joined_tokens
from train_t2i.families.flow import PATCH, pack
from train_t2i.families.qwen_image import QwenImage


class QwenImageEdit(QwenImage):
    """One source a row."""

    Pipeline = QwenImageEditPipeline
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "processor")

    def __init__(self, pipe: Any, config: dict[str, Any], load_net: Any, options: FamilyOptions) -> None:
        super().__init__(pipe, config, load_net, options)
        if pipe.text_encoder is not None:
            tell_token_types(pipe.text_encoder)

    @classmethod
    def from_pretrained(cls, model: str, options: FamilyOptions) -> Self:
        folder = Path(model)
        if folder.is_dir() and not (folder / "processor").is_dir():
            raise UserError(
                f"--pretrained-model {model}: has no processor/, which shows sources to the text encoder",
                "give an edit model (Qwen/Qwen-Image-Edit, Qwen/Qwen-Image-Edit-2509), or copy processor/ from one",
            )
        return super().from_pretrained(model, options)

    # -- text and sources ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], negative: str | None = None, sources: Sequence[Sequence[Source]] = ()
    ) -> Cond:
        """A negative is another text about the same sources, as the pipelines have it.

        Rows share the sizes of their sources, in order.  Raises ValueError where they do not.
        """
        rows, count = list(sources) or [()] * len(prompts), len(prompts)
        if negative is None:
            told, away = self._states(prompts, rows), None
        else:
            states = self._states([*prompts, *[negative] * count], rows * 2)
            told, away = states[:count], _joined(states[count:])
        cond = _joined(told)
        context, shapes = self._context(rows, cond.tokens.dtype)
        return replace(cond, negative=away, context=context, shapes=shapes)

    def _states(self, prompts: Sequence[str], rows: Sequence[Sequence[Source]]) -> list[Tensor]:
        """(L, D) a row: what the pipeline's ``encode_prompt`` makes of it alone, in one call of the encoder for all."""
        pipe = self.pipe
        texts = [self._text(prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)]
        seen = [_picture(source) for source in chain.from_iterable(rows)] or None
        told = pipe.processor(text=texts, images=seen, padding=True, return_tensors="pt").to(self.device)
        out = pipe.text_encoder(
            input_ids=told["input_ids"], attention_mask=told["attention_mask"], pixel_values=told.get("pixel_values"),
            image_grid_thw=told.get("image_grid_thw"), output_hidden_states=True,
        )  # fmt: skip
        head = pipe.prompt_template_encode_start_idx
        states = pipe._extract_masked_hidden(out.hidden_states[-1], told["attention_mask"])
        return [state[head:].to(pipe.text_encoder.dtype) for state in states]

    def _text(self, prompt: str, num_sources: int) -> str:
        if num_sources != 1:
            raise ValueError(f"qwen_image_edit takes one source a row, not {num_sources}")
        return self.pipe.prompt_template_encode.format(prompt)

    def _context(
        self, rows: Sequence[Sequence[Source]], dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[tuple[int, int, int], ...]]:
        """Packed latents of the first, second, ... source of all rows, and their sizes in patches."""
        latents = []
        for column in zip(*rows, strict=True):
            pixels = torch.stack([source.pixels for source in column])
            latents.append(self.to_latents(pixels.to(self.device).float() / 255))
        shapes = tuple((1, z.shape[-2] // PATCH, z.shape[-1] // PATCH) for z in latents)
        return tuple(pack(z).to(dtype) for z in latents), shapes

    def call_options(self, cfg: float) -> dict[str, Any]:
        options = super().call_options(cfg)
        del options["max_sequence_length"]  # nothing is cut off
        return options


class QwenImageEditPlus(QwenImageEdit):
    """None to several sources a row, named Picture 1, Picture 2, ... in the text."""

    Pipeline = QwenImageEditPlusPipeline

    def _text(self, prompt: str, num_sources: int) -> str:
        pictures = "".join(QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE.format(i + 1) for i in range(num_sources))
        return self.pipe.prompt_template_encode.format(pictures + prompt)


def _joined(states: Sequence[Tensor]) -> Cond:
    tokens, mask = joined_tokens([(state[None], None) for state in states])
    return Cond(tokens, mask=mask)


def _picture(source: Source) -> Image.Image:
    return Image.fromarray(source.seen.permute(1, 2, 0).numpy())


def tell_token_types(encoder: nn.Module) -> RemovableHandle:
    """Have a Qwen2.5-VL told which tokens are an image's, wherever it is shown one; what is returned takes it back.

    The pipelines of diffusers 0.42 leave it out, and transformers 5 then numbers these tokens one after the other instead
    of by row and column (M-RoPE, arXiv 2409.12191, section 2.1).  An exported pipeline needs the same: docs/supervised.md.
    """
    return encoder.register_forward_pre_hook(_with_token_types, with_kwargs=True)


def _with_token_types(encoder: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if named.get("image_grid_thw") is None or named.get("mm_token_type_ids") is not None:
        return arguments, named
    is_image = named["input_ids"] == encoder.config.image_token_id
    return arguments, named | {"mm_token_type_ids": is_image.int()}
