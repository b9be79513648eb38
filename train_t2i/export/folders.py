"""What is written is complete or absent, is read back, and says in its own header how it is sampled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from train_t2i.errors import EXIT_DISK, UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
LENGTH_BYTES = ALIGNMENT = 8  # of a safetensors file: its header's length stands first; its tensors begin at a multiple
CHUNK_BYTES = 1 << 24


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name ``out`` once everything is in it; else nothing is left."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, out)  # noqa: PTH104 - refuses a folder that came meanwhile and has something in it
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error})", "make room, or choose another", EXIT_DISK
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stamp(file: Path, said: Mapping[str, str]) -> None:
    """Put ``said`` and the SHA-256 of the tensors' bytes into the header of a safetensors file.

    The tensors are copied as they are.  The same tensors and words make the same file, to the last byte, which safetensors' own
    writer does not promise: it orders metadata at random.  Layout: safetensors' README, "Format".
    """
    stamped = file.with_suffix(".stamped")
    with file.open("rb") as old, stamped.open("wb") as new:
        length = int.from_bytes(old.read(LENGTH_BYTES), "little")
        header = json.loads(old.read(length))
        digest = hashlib.file_digest(old, "sha256").hexdigest()
        metadata = header.pop("__metadata__", {}) | said | {"modelspec.hash_sha256": f"0x{digest}"}
        text = json.dumps({"__metadata__": metadata, **header}).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        new.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        old.seek(LENGTH_BYTES + length)
        shutil.copyfileobj(old, new, CHUNK_BYTES)
    stamped.replace(file)


def seal(net: nn.Module, folder: Path, header: Mapping[str, str]) -> None:
    """Stamp the weights files that diffusers wrote of ``net``, then read them back.  Raises UserError."""
    for file in sorted(folder.glob("*.safetensors")):
        stamp(file, header)
    if wrong := written_wrong(net, folder):
        raise UserError(
            f"--out: {len(wrong)} tensors were not written as they are, first {wrong[0]}",
            "is the disk sound? export to another",
            EXIT_DISK,
        )


def written_wrong(net: nn.Module, folder: Path) -> list[str]:
    """Names of what the weights files of ``folder`` have otherwise than ``net``, bit for bit, or in another file than their
    index says; a file that cannot be read is named itself.  Each is read once, a tensor at a time."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    expected, index = net.state_dict(), folder / f"{WEIGHTS}.index.json"
    places: dict[str, str] = dict.fromkeys(expected, WEIGHTS)
    if index.exists():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    wrong = sorted(places.keys() ^ expected.keys())
    for name in sorted(set(places.values())):
        listed = {key for key, place in places.items() if place == name}
        try:
            with safe_open(folder / name, framework="pt") as file:
                held = set(file.keys())
                wrong += sorted(held ^ listed)
                for key in sorted(held & listed & expected.keys()):
                    tensor, ours = file.get_tensor(key), expected[key]
                    alike = (tensor.shape, tensor.dtype) == (ours.shape, ours.dtype)
                    if not alike or not torch.equal(bits(tensor), bits(ours)):
                        wrong.append(key)
        except SafetensorError:
            wrong.append(name)
    return wrong
