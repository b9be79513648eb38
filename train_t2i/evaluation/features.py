"""The spaces in which sets of images are compared, and the features of the real images that they are compared with.

held_out    image features of the CLIP tower that was in no loss, of length one
inception   Inception-v3's, in which published FID and KID are taken

Shapes: images (B, 3, H, W) in [0, 1]; features (B, D) fp32 on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from train_t2i import metrics, storage
from train_t2i.errors import UserError
from train_t2i.evaluation.inception import Inception
from train_t2i.image_data import encoded
from train_t2i.rows import Row, load_rows
from train_t2i.sizes import Size

if TYPE_CHECKING:
    from train_t2i.evaluate import EvaluateConfig

REFERENCE_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of a reference folder


def distances(space: str, features: Tensor, reference: Tensor) -> dict[str, float]:
    """The columns of a space."""
    if space == "inception":
        return {
            "fid": metrics.frechet(features, reference),
            "kid_inception": metrics.kernel_distance(features, reference),
        }
    return {
        "frechet": metrics.frechet(features, reference),
        "kid": metrics.kernel_distance(features, reference, gamma=1),  # of the cosine
        "recall": metrics.recall(features, reference),
        "precision": metrics.precision(features, reference),
    }


def reference_rows(reference: str, count: int) -> list[Row]:
    """The rows of a table, or the images of a folder in the order of their names.  Raises UserError."""
    folder = Path(reference)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in REFERENCE_KINDS and path.is_file())
        rows = [Row(folder, number, path, "") for number, path in enumerate(files, 1)]
    else:
        rows = load_rows(reference)
    rows = rows[: count or None]
    if len(rows) < metrics.LEAST_ROWS:
        raise UserError(f"--reference {reference}: {len(rows)} rows", f"give {metrics.LEAST_ROWS} at least")
    return rows


class Features:
    """Features of images in every space that was asked for, and of the reference at the size of the model in turn."""

    def __init__(self, config: EvaluateConfig, held_out: Any, held_out_digest: str, device: torch.device) -> None:
        self.rows = reference_rows(config.reference, config.reference_count) if config.reference else []
        self.kept_in = Path(config.out).parent if config.out else None
        self.spaces: dict[str, Callable[[Tensor], Tensor]] = {}
        self.reads: dict[str, str] = {}  # space -> all that its features depend on, beside the images
        self.inception_digest: dict[str, str] = {}
        self.references: dict[str, Tensor] = {}  # space -> (N, D)
        self._reference_px: Size | None = None
        if held_out is not None:
            self.spaces["held_out"] = held_out.encode_images
            self.reads["held_out"] = f"{held_out_digest} {held_out.source.preprocess}"
        if config.inception:
            self.spaces["inception"] = Inception(config.inception, device)
            self.reads["inception"] = storage.digest(Path(config.inception))[1]
            self.inception_digest = {"inception": self.reads["inception"]}

    @torch.no_grad()
    def of(self, images: Tensor) -> dict[str, Tensor]:
        return {space: encode(images).float().cpu() for space, encode in self.spaces.items()}

    def prepare(self, size_px: Size) -> None:
        """Features of the reference at a model's size; kept beside the table, under a digest of all they depend on."""
        if not self.rows or self._reference_px == size_px:
            return
        found = {}
        for space in self.spaces:
            path = (
                self.kept_in / f"reference-features-{self._key(space, size_px)}.safetensors" if self.kept_in else None
            )
            features = read_features(path, len(self.rows)) if path else None
            if features is None:
                features = encoded(self.rows, size_px, self.spaces[space], told="reference")
                if path:
                    write_features(path, features)
            found[space] = features
        self.references, self._reference_px = found, size_px

    def _key(self, space: str, size_px: Size) -> str:
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{size_px} {self.reads[space]}".encode())
        for row in self.rows:
            digest.update(_image_digest(row))
        return digest.hexdigest()


def _image_digest(row: Row) -> bytes:
    try:
        return hashlib.blake2b(row.target.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise UserError(f"{row.place}: image {row.target.name} cannot be read ({error.strerror})") from None


def read_features(path: Path, count: int) -> Tensor | None:
    """Features kept by an earlier evaluation, or None where there are none that can be used."""
    if not path.is_file():
        return None
    try:
        features = load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if len(features) == count else None


def write_features(path: Path, features: Tensor) -> None:
    """Keep features; complete or absent.  Without room for it, the next evaluation computes them again."""
    try:
        storage.write_atomically(path, save({"features": features.contiguous()}))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})", "choose another --out") from None
