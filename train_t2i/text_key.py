"""What decides an embedding besides the prompt, so that a cache made with anything else can be refused.

Weights are told by their tensors, not their files: names, types, shapes and bytes, whatever way a model was split and saved;
settings (activation, positions, pad token, ...) by their values, without what only says who saved them and how.  Both are read
from where the model lies, since training from a cache does not load them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import xxhash

from train_t2i.errors import UserError

CHUNK_BYTES = 8 << 20
PARTS = ("text_encoder*", "tokenizer*")
WEIGHTS = (  # the first that there is
    "model.safetensors", "model-*-of-*.safetensors", "pytorch_model*.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors", "diffusion_pytorch_model*.bin",
)  # fmt: skip
VOCABULARIES = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json")
# Keys that change when a model is saved again, or by another version: they decide no embedding.  The weights say their own
# type, and pipelines have a template of their own.
PROVENANCE = {
    "_diffusers_version", "transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "architectures",
    "backend", "is_local", "local_files_only", "special_tokens_map_file", "tokenizer_file", "chat_template",
}  # fmt: skip
ENCODERS_IN_FILE, DENOISER_IN_FILE = "conditioner.", "model.diffusion_model."  # of a single-file model


def text_key(family: Any, model: str) -> dict[str, Any]:
    """JSON-able: pipeline class, template, length in tokens and the encoders' digest (None where their files are not here)."""
    pipe = family.pipe
    return {
        "pipeline": type(pipe).__name__,
        "text_length": family.text_length,
        "template": {name: value for name, value in sorted(vars(pipe).items()) if "template" in name},
        "zeros_for_empty": bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
        "encoder": encoder_digest(model),
    }


def encoder_digest(model: str) -> str | None:
    """xxh3_128 of the text encoders and tokenizers, weights and settings, of a pipeline folder, single file or hub id.

    None: they are not here.  Raises UserError for files that cannot be read.
    """
    return _digest(model, PARTS, ENCODERS_IN_FILE)


def denoiser_digest(model: str, name: str) -> str | None:
    """The same of the denoiser alone, which lies in the folder ``name`` of its pipeline."""
    return _digest(model, (name,), DENOISER_IN_FILE)


def _digest(model: str, parts: Sequence[str], prefix: str) -> str | None:
    path = Path(model)
    whole = xxhash.xxh3_128()
    try:
        if path.is_file():
            for told in _tensors(path, prefix):
                whole.update(told)
            return whole.hexdigest()
        root = path if path.is_dir() else _snapshot(model)
        folders = sorted(folder for part in parts for folder in (root.glob(part) if root else ()) if folder.is_dir())
        if not any(_weights(folder) for folder in folders):
            return None
        for folder in folders:
            whole.update(folder.name.encode())
            for told in _folder(folder):
                whole.update(told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--pretrained-model {model}: cannot be read ({error})", "get it again") from None
    return whole.hexdigest()


def _snapshot(model: str) -> Path | None:
    """Where a hub model was downloaded to."""
    try:
        return Path(huggingface_hub.snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):
        return None


def _weights(folder: Path) -> list[Path]:
    return next((found for kind in WEIGHTS if (found := sorted(folder.glob(kind)))), [])


def _folder(folder: Path) -> Iterator[bytes]:
    for file in (folder / name for name in SETTINGS):
        if file.is_file():
            yield file.name.encode()
            yield json.dumps(_lasting(json.loads(file.read_bytes())), sort_keys=True).encode()
    weights = _weights(folder)
    if weights and weights[0].suffix == ".safetensors":
        headers = {name: (path, entry, at) for path in weights for name, entry, at in _entries(path)}
        for name in sorted(headers):
            path, entry, at = headers[name]
            yield from _tensor(path, name, entry, at)
        return
    names = [file for name in VOCABULARIES if (file := folder / name).is_file()] or sorted(
        folder.glob("tokenizer.json")
    )
    for file in [*weights, *names]:
        yield file.name.encode()
        yield from _bytes(file, 0, file.stat().st_size)


def _lasting(value: Any) -> Any:
    """Settings without PROVENANCE, at any depth: models of several parts have settings for each."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in PROVENANCE}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def _tensors(path: Path, prefix: str) -> Iterator[bytes]:
    for name, entry, at in sorted(_entries(path), key=lambda found: found[0]):
        if name.startswith(prefix):
            yield from _tensor(path, name, entry, at)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, what the header says of it, where the tensors begin) of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= path.stat().st_size - 8:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, entry, 8 + size


def _tensor(path: Path, name: str, entry: dict[str, Any], at: int) -> Iterator[bytes]:
    first, last = entry["data_offsets"]
    yield f"{name} {entry['dtype']} {entry['shape']}".encode()
    yield from _bytes(path, at + first, last - first)


def _bytes(path: Path, first: int, count: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        while count > 0 and (block := file.read(min(CHUNK_BYTES, count))):
            count -= len(block)
            yield block
