"""A model of which only the shapes are there: from the table of published ones, or from a folder's config files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from train_t2i.config import EDIT_FAMILIES, Config, parse_resolution, seen_side
from train_t2i.errors import UserError
from train_t2i.families import Cond, Family, FamilyOptions, family_class, family_of
from train_t2i.families.loading import check_channels, told
from train_t2i.families.published import FIRST_OF, PUBLISHED, Published

META = torch.device("meta")
Make = Callable[[Any, dict[str, Any], torch.dtype], Any]  # (class of diffusers, its config, format) -> a module
SEEN_TOKEN_PX = 28  # side of the square that Qwen2.5-VL makes a token of
LATENT_TOKEN_WIDTH = 64  # of a packed source


@dataclass(frozen=True)
class Shapes:
    """A family without content, and how many parameters lie beside its denoiser."""

    family: Any  # Family
    num_encoder_parameters: int


def published_of(run: Config, name: str | None) -> tuple[str, Published]:
    """(what to call it, its architecture): --model, a folder, a published repository, or the first of the family.

    Raises UserError where none of them says which.
    """
    wanted = None if run.model_family == "auto" else run.model_family
    if name is None and Path(run.pretrained_model).is_dir():
        found = read_folder(Path(run.pretrained_model))
        check_wanted(f"--pretrained-model {run.pretrained_model}", found.family, wanted)
        return run.pretrained_model, found
    if name is None:
        by_hub = {p.repository: key for key, p in PUBLISHED.items() if wanted in (None, p.family)}
        default = wanted if run.pretrained_model == Config.pretrained_model else None
        name = by_hub.get(run.pretrained_model) or FIRST_OF.get(default or "")
    if name is None:
        raise UserError(
            f"--pretrained-model {run.pretrained_model}: its sizes are not known here",
            f"give --model (one of {', '.join(PUBLISHED)}), or a local pipeline folder",
        )
    check_wanted(f"--model {name}", PUBLISHED[name].family, wanted)
    return name, PUBLISHED[name]


def check_wanted(model: str, family: str, wanted: str | None) -> None:
    if wanted not in (None, family):
        raise UserError(f"{model} is of the family {family}", f"leave out --family {wanted}")


def read_folder(folder: Path) -> Published:
    """The configs of a diffusers pipeline folder.  Raises UserError."""
    family = family_of(str(folder))
    denoiser = family_class(family).denoiser_name
    with told_of(str(folder)):
        encoders = tuple(_encoder(part) for part in sorted(folder.glob("text_encoder*")) if part.is_dir())
        read = {part: _read(folder / part / "config.json") for part in (denoiser, "vae")}
        scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    return Published(family, str(folder), read[denoiser], read["vae"], encoders, scheduler)


def _read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _encoder(folder: Path) -> tuple[str, dict[str, Any]]:
    file = folder / "config.json"
    config = _read(file)
    kinds = config.get("architectures") or [""]
    if kinds[0] not in dir(transformers):
        raise UserError(f'{file}: "architectures" names no model of transformers', "download the model again")
    return kinds[0], config


@contextmanager
def told_of(model: str) -> Iterator[None]:
    """As the loaders' own errors are told, and what a config without sense makes of lists and numbers."""
    with told(model, "--pretrained-model", "a complete diffusers pipeline folder"):
        try:
            yield
        except (LookupError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def empty_family(found: Published, run: Config, dtype: torch.dtype, make: Make | None = None) -> Shapes:
    """The trainer's family on meta tensors; its ``encode`` gives conditionings of the right shapes.

    ``make(class, config, dtype)`` may give modules with content in their place.
    """
    make = make or _on_meta
    if run.tiny_vae and found.family.startswith("qwen_image"):
        raise UserError("--tiny-vae: Qwen-Image has no tiny decoder", "leave it out")
    kind = family_class(found.family)
    assemble = _empty_sdxl if found.family == "sdxl" else _empty_flow
    with told_of(found.repository):
        family: Any = assemble(kind, found, run, dtype, make)
        widths = cond_widths(found)
        num_encoder_parameters = sum(count_encoder(*encoder) for encoder in found.encoders)
    if run.tiny_vae:
        family.tiny = _empty_tiny(run, family.latent_channels, make)

    sources = [run.source_size] * found.num_sources if found.family in EDIT_FAMILIES else []

    def encode(prompts: Sequence[str], negative: str | None = None, told: Sequence[Any] = ()) -> Cond:
        made: Callable[[], Cond] = partial(empty_cond, family, found.family, widths, len(prompts), dtype)
        if sources:
            made = partial(empty_edit, made, sources, seen_side(run) or run.source_size)
        return made() if negative is None else replace(made(), negative=made())

    family.encode = encode
    return Shapes(family.to(META) if make is _on_meta else family, num_encoder_parameters)


def _on_meta(kind: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    with META:
        return nn.Module.to(kind.from_config(config), dtype)


def _empty_sdxl(kind: Any, found: Published, run: Config, dtype: torch.dtype, make: Make) -> Family:
    from train_t2i.families.sdxl_file import scheduler

    pipe = SimpleNamespace(
        vae=make(diffusers.AutoencoderKL, found.vae, torch.float32), text_encoder=None, text_encoder_2=None,
        scheduler=scheduler(),
    )  # fmt: skip

    def load(dtype: torch.dtype) -> Any:
        with told_of(found.repository):
            return make(diffusers.UNet2DConditionModel, found.denoiser, dtype)

    return kind(pipe, load, shift=run.shift or 1.0, checkpoint_decoder="decoder" in run.recomputed)


def _empty_flow(kind: Any, found: Published, run: Config, dtype: torch.dtype, make: Make) -> Family:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(found.scheduler)
    pipe = SimpleNamespace(
        vae=make(kind.Autoencoder, found.vae, dtype), scheduler=scheduler, **dict.fromkeys(kind.encoder_names)
    )
    options = FamilyOptions(
        dtype=dtype, shift=run.shift or None, size_px=parse_resolution(run.resolution), encoders=False,
        text_length=run.text_length or None, guidance=run.guidance_embed, checkpoint_decoder="decoder" in run.recomputed,
    )  # fmt: skip
    config = dict(_on_meta(kind.Transformer, found.denoiser, dtype).config)
    return kind(pipe, config, lambda dtype: make(kind.Transformer, found.denoiser, dtype), options)


def _empty_tiny(run: Config, latent_channels: int, make: Make) -> Any:
    """A local decoder's own shape, else TAESD's."""
    config = Path(str(run.tiny_vae)) / "config.json"
    with told(str(run.tiny_vae), "--tiny-vae", "a folder with its config.json"):
        shape = _read(config) if config.is_file() else {"latent_channels": latent_channels}
        tiny = make(diffusers.AutoencoderTiny, shape, torch.float32).requires_grad_(False)
    check_channels(tiny, latent_channels, f"--tiny-vae {run.tiny_vae}")
    if "decoder" in run.recomputed:
        tiny.enable_gradient_checkpointing()
    return tiny


def cond_widths(found: Published) -> tuple[int, int | None]:
    """(of a text token, of the pooled vector), as the denoiser's config has them.  Raises ValueError where it has not."""

    def width(name: str) -> int:
        value = found.denoiser.get(name)
        if not isinstance(value, int):
            raise ValueError(f"its denoiser's config says no {name}")
        return value

    if found.family == "sdxl":
        sizes = 6 * width("addition_time_embed_dim")  # size ids (B, 6)
        return width("cross_attention_dim"), width("projection_class_embeddings_input_dim") - sizes
    return width("joint_attention_dim"), None if found.family.startswith("qwen_image") else width(
        "pooled_projection_dim"
    )


def empty_cond(family: Any, name: str, widths: tuple[int, int | None], rows: int, dtype: torch.dtype) -> Cond:
    """What ``rows`` prompts become, each as long as the longest."""
    length = family.text_length + (77 if name == "sd3" else 0)  # CLIP's 77 tokens stand before T5's
    tokens, pooled = widths
    cond = Cond(
        torch.empty(rows, length, tokens, dtype=dtype, device=META),
        None if pooled is None else torch.empty(rows, pooled, dtype=dtype, device=META),
    )
    return family.told_guidance(cond, family.options.guidance) if name == "flux" else cond


def empty_edit(text: Callable[[], Cond], sides_px: Sequence[int], seen_px: int) -> Cond:
    """A conditioning with square sources: their latents, and behind the text the tokens that the encoder saw them as."""
    cond, patch_px = text(), 16
    rows, length, width = cond.tokens.shape
    length += len(sides_px) * round(seen_px / SEEN_TOKEN_PX) ** 2
    cells = [round(side / patch_px) for side in sides_px]
    context = tuple(cond.tokens.new_empty(rows, n * n, LATENT_TOKEN_WIDTH) for n in cells)
    return Cond(cond.tokens.new_empty(rows, length, width), context=context, shapes=tuple((1, n, n) for n in cells))


def count_encoder(kind: str, config: dict[str, Any]) -> int:
    """Parameters of a text encoder: the class of transformers that its config names."""
    made = getattr(transformers, kind)
    with META:
        return sum(p.numel() for p in made(made.config_class(**config)).parameters())
