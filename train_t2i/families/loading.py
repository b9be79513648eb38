"""What every family loads in the same way: parts of a pipeline folder, with one line where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny
from safetensors import SafetensorError

from train_t2i import redact
from train_t2i.errors import UserError

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

# what loaders raise
ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)


@contextmanager
def told(source: str, flag: str, takes: str = "a hub id or a diffusers pipeline folder") -> Iterator[None]:
    """Turns the loaders' many exceptions into one line that names the flag, what was given and what it ``takes``."""
    try:
        yield
    except ERRORS as error:
        first_line = (redact.clean(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
        if "meta tensor" in first_line:  # what diffusers leaves where a file has no weight
            first_line = "some of its weights are missing"
        raise UserError(f"{flag} {source}: cannot be loaded ({first_line})", f"give {takes}") from error


def load_pipeline(kind: Any, model: str, dtype: torch.dtype, without: tuple[str, ...], **options: Any) -> Any:
    """A pipeline of class ``kind`` but the parts named in ``without``, silent."""
    with told(model, "--pretrained-model"):
        absent: dict[str, Any] = dict.fromkeys(without)
        pipe = kind.from_pretrained(model, dtype=dtype, **absent, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def load_autoencoder(kind: Any, source: str, flag: str, channels: int, dtype: torch.dtype = torch.float32) -> Any:
    """One of class ``kind`` whose latents have ``channels``, from its own folder or a hub id.  Raises UserError."""
    if Path(source).is_file():
        raise UserError(f"{flag} {source}: is a file", "give the folder with its config.json, or a hub id")
    takes = "a folder with its config.json, or a hub id"
    with told(source, flag, takes):
        coder, found = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if missing := found["missing_keys"]:  # diffusers draws them at random
        raise UserError(
            f"{flag} {source}: holds no {kind.__name__} ({len(missing)} weights are missing)", f"give {takes}"
        )
    check_channels(coder, channels, f"{flag} {source}")
    return coder


def load_tiny(source: str | None, channels: int) -> Any:
    """The small autoencoder whose decoder serves rewards, where one is given."""
    return load_autoencoder(AutoencoderTiny, source, "--tiny-vae", channels) if source else None


def check_channels(coder: Any, channels: int, given: str) -> None:
    """Raises UserError where the autoencoder that was ``given`` is of latents with another number of channels."""
    found = coder.config.get("latent_channels", coder.config.get("z_dim"))  # Qwen-Image's own name for it
    if found != channels:
        raise UserError(
            f"{given}: its latents have {found} channels, this model's {channels}", "give one made for this model"
        )
