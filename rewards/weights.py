"""Reads weights from files that nobody has to trust.

A file is safetensors, or a torch archive read with ``weights_only=True``; there is no fallback, so code inside a pickle
never runs.  What a file is, is read off its first bytes rather than its name.  Everything that is wrong with it becomes
one ``RewardError`` that names the file and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rewards.base import RewardError

DOWNLOAD_AGAIN = "download it again"
CONVERT = "convert it to safetensors on a machine you trust"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # in the order of preference
Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")
STARTS_AT_ZERO = (
    "lora_B",
    "lora_up",
    "lora.up",
)  # second factors of a LoRA, in peft's, kohya's and diffusers' older names


def read_shapes(path: Path) -> Shapes:
    """Name -> shape of every tensor, from the header alone where the format allows it.

    A 4 GB file takes milliseconds: safetensors has a header, torch's zip format is mapped, not read.
    Raises RewardError.
    """
    if file_kind(path) == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return strip_module({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            _refuse(path, error)
    return {name: tuple(tensor.shape) for name, tensor in _load_torch(path, lazy=True).items()}


def read_state(path: Path) -> dict[str, Tensor]:
    """Name -> CPU tensor, in the file's own dtype, freed from ``{"state_dict": ...}`` and ``module.`` prefixes.

    Raises RewardError: also for a tensor with NaN or infinity in it and for a matrix of nothing but zeros, which is
    what an interrupted download leaves behind.  The second factor of a LoRA may be zero: it begins there, and a layer
    whose output nobody reads stays there.
    """
    if file_kind(path) == "safetensors":
        try:
            state = strip_module(load_file(path))
        except (SafetensorError, OSError) as error:
            _refuse(path, error)
    else:
        state = _load_torch(path, lazy=False)
    for name, tensor in state.items():
        _check_values(path, name, tensor)
    return state


def file_kind(path: Path) -> str:
    """'safetensors' or 'torch', from the first bytes; RewardError for anything that is neither."""
    if not path.exists():
        raise RewardError(path, "there is no such file", "check the path, or fetch the weights first")
    if not path.is_file():
        raise RewardError(path, "is not a file", "name the weights file itself")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise RewardError(path, f"cannot be read ({error.strerror})", "check its permissions") from None
    if not head:
        raise RewardError(path, "is empty", DOWNLOAD_AGAIN)
    if not head.strip(b"\0"):
        raise RewardError(path, "is filled with zeros", DOWNLOAD_AGAIN)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip archive; its older bare pickle
        return "torch"
    if head.lstrip().startswith(b"<"):
        raise RewardError(path, "is a web page, not weights", f"log in where it asks you to and {DOWNLOAD_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise RewardError(path, "is a Git LFS pointer, not the weights", "run `git lfs pull`, or download the file")
    hint = f"{DOWNLOAD_AGAIN}, or convert it to safetensors"
    raise RewardError(path, "is neither safetensors nor a torch file", hint)


def find_weights(folder: Path) -> Path:
    """The one weights file of a folder; safetensors before torch files.  RewardError for none, or several of a kind."""
    for suffix in SUFFIXES:
        found = sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:3])
            raise RewardError(folder, f"holds several weights files ({names})", "leave only one there")
        if found:
            return found[0]
    raise RewardError(folder, "holds no weights file (*.safetensors, *.pt, *.bin)", DOWNLOAD_AGAIN)


def check_digests(files: Sequence[str | Path], sha256: Sequence[str]) -> None:
    """RewardError unless each digest, in hex, is that of one of the files: a flipped bit shows in nothing else."""
    found = {str(file): sha256_of(Path(file)) for file in files}
    for digest in sha256:
        if digest.strip().lower() not in found.values():
            told = ", ".join(f"{value} is that of {Path(file).name}" for file, value in found.items())
            path = next(iter(found), "no file")
            raise RewardError(path, f"has not the sha256 {digest} ({told})", f"{DOWNLOAD_AGAIN}, or correct the digest")


def sha256_of(path: Path) -> str:
    """In hex.  Raises RewardError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RewardError(path, f"cannot be read ({error.strerror})", "check its permissions") from None


def check_shapes(path: Path, found: Shapes, wanted: Shapes, what: str) -> None:
    """RewardError unless both have the same names and shapes (a scalar may be stored as one element).

    ``what`` names the tower in the message, as "ViT-H-14".
    """
    hint = f"this is not the {what} expected here: check the file, or give a folder with its own open_clip_config.json"
    missing = [name for name in wanted if name not in found]
    if missing:
        raise RewardError(path, f"has no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} missing)", hint)
    extra = [name for name in found if name not in wanted]
    if extra:
        raise RewardError(path, f"has a tensor {extra[0]!r} that does not belong ({len(extra)} in all)", hint)
    for name, shape in wanted.items():
        scalar = shape in ((), (1,)) and found[name] in ((), (1,))
        if found[name] != shape and not scalar:
            raise RewardError(path, f"has {name!r} of shape {list(found[name])} instead of {list(shape)}", hint)


def strip_module(state: Mapping[str, T]) -> dict[str, T]:
    """Drops the ``module.`` that a wrapper for several devices puts before every name."""
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _load_torch(path: Path, *, lazy: bool) -> dict[str, Tensor]:
    """A torch file's tensors.  ``lazy`` maps the file, so that only the touched pages are read."""
    with path.open("rb") as file:
        mapped = lazy and file.read(2) == b"PK" and path.suffix != SUFFIXES[0]
        file.seek(0)
        try:  # torch maps files by name alone, and takes the name for the format where it ends in .safetensors
            content: Any = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises anything from EOFError to RuntimeError here
            _refuse(path, error)
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise RewardError(path, "holds no state dict", "save model.state_dict() as safetensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            reason = f"has {type(value).__name__} at {name!r} where a tensor should be"
            raise RewardError(path, reason, "save model.state_dict() alone, as safetensors")
    return strip_module(content)


def _refuse(path: Path, error: Exception) -> NoReturn:
    """Turns a reader's exception into one line that says what the file is rather than where torch was."""
    text = str(error)
    if "weights_only" in text.lower() or "Weights only" in text or type(error).__name__ == "UnpicklingError":
        reason = "holds more than tensors (a pickle that would run code, or a damaged one); nothing in it was run"
        raise RewardError(path, reason, f"{CONVERT}, or {DOWNLOAD_AGAIN}") from None
    if isinstance(error, MemoryError) or "not enough memory" in text:
        raise RewardError(path, "does not fit into memory", "free some, or use a machine with more") from None
    raise RewardError(path, f"is truncated or damaged ({type(error).__name__})", DOWNLOAD_AGAIN) from None


def _check_values(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (float(value) for value in torch.aminmax(tensor))  # NaN passes through
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise RewardError(path, f"has NaN or infinity in {name!r}", DOWNLOAD_AGAIN)
    if tensor.ndim > 1 and low == high == 0.0 and not any(mark in name for mark in STARTS_AT_ZERO):
        raise RewardError(path, f"has nothing but zeros in {name!r}", DOWNLOAD_AGAIN)
