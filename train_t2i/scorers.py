"""What ``evaluate`` scores images with: an adherence function, reward models, a held-out tower and its reference.

Shapes: images (B, 3, H, W) in [0, 1]; scores (B,) fp32 on the CPU; features (B, D).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

import rewards
from train_t2i import storage
from train_t2i.errors import UserError
from train_t2i.pictures import fit_image
from train_t2i.rows import Row, load_rows
from train_t2i.student import default_device

if TYPE_CHECKING:
    from train_t2i.evaluate import EvaluateConfig

Score = Callable[[Tensor, Sequence[str]], Tensor]
REFERENCE_BATCH = 64
MIN_ROWS = 4  # of which each has three neighbours


def load_scorer(spec: str) -> Score:
    """``module:function`` -> the function.  Raises UserError."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise UserError(f"--scorer {spec}: not module:function", "e.g. shapes.oracle:adherence")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--scorer {spec}: {error}", "run from the folder that holds the module") from None
    if not callable(found):
        raise UserError(f"--scorer {spec}: not a function")
    return found


def load_reward(kind: str, path: str, device: torch.device) -> Any:
    try:
        return rewards.REWARDS[kind](path, device=device)
    except rewards.RewardError as error:
        raise UserError(str(error)) from None


class Scorers:
    """Everything that a row of the table is computed with; built, and so checked, before any model is loaded."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.device = default_device()
        self.adherence = load_scorer(config.scorer) if config.scorer else None
        self.rows = load_rows(config.reference)[: config.reference_count or None] if config.reference else []
        if config.reference and len(self.rows) < MIN_ROWS:
            raise UserError(f"--reference {config.reference}: {len(self.rows)} rows", f"give {MIN_ROWS} at least")
        towers = {"clip": ("clip", config.clip_reward_model), "hps": ("hpsv2", config.hpsv2_reward_model)}
        self.rewards = {name: load_reward(kind, path, self.device) for name, (kind, path) in towers.items() if path}
        self.held_out = load_reward("clip", config.held_out_model, self.device) if config.held_out_model else None
        self.reference: Tensor | None = None  # (N, D)
        self._reference_px: tuple[int, int] | None = None
        self.told: dict[str, Any] = {
            "scorer": config.scorer,
            "clip": config.clip_reward_model,
            "hps": config.hpsv2_reward_model,
            "magic_prompt": config.magic_prompt,
            "held_out": config.held_out_model,
            "reference": config.reference,
            "reference_count": len(self.rows),
            "weights_xxh3": {name: weights_digest(tower) for name, tower in self._towers().items()},
        }

    def _towers(self) -> dict[str, Any]:
        return self.rewards | ({"held_out": self.held_out} if self.held_out is not None else {})

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Column name -> (B,) fp32, in the order of the table."""
        found: dict[str, Tensor] = {}
        if self.adherence is not None:
            found["adherence"] = self._adherence(images.cpu(), prompts)
        prefix = self.config.magic_prompt
        for name, tower in self._towers().items():
            told = [f"{prefix} {prompt}" for prompt in prompts] if name == "hps" and prefix else prompts
            found[name] = tower(images, told).float().cpu()
        return found

    def _adherence(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert self.adherence is not None
        try:
            scores = torch.as_tensor(self.adherence(images, list(prompts)), dtype=torch.float32).cpu()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--scorer {self.config.scorer}: {error}", "give prompts that it knows") from None
        if scores.shape != (len(prompts),):
            raise UserError(
                f"--scorer {self.config.scorer}: returned {tuple(scores.shape)} for {len(prompts)} images",
                "it returns one score an image",
            )
        return scores

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, D) fp32 on the CPU: the held-out tower's image features, of length one."""
        assert self.held_out is not None
        return self.held_out.encode_images(images).float().cpu()

    def prepare_reference(self, size_px: tuple[int, int]) -> None:
        """Features of the reference at a model's size; kept beside the table, under a digest of all they depend on."""
        if not self.rows or self._reference_px == size_px:
            return
        key = self._reference_key(size_px)
        path = Path(self.config.out).parent / f"reference-features-{key}.safetensors" if self.config.out else None
        self.reference = read_features(path, len(self.rows)) if path else None
        if self.reference is None:
            self.reference = self._reference_features(size_px)
            if path:
                write_features(path, self.reference)
        self._reference_px = size_px

    def _reference_features(self, size_px: tuple[int, int]) -> Tensor:
        features = []
        for first in tqdm(range(0, len(self.rows), REFERENCE_BATCH), unit="batch", desc="reference"):
            rows = self.rows[first : first + REFERENCE_BATCH]
            features.append(self.features(torch.stack([fit_image(row.target, row.place, *size_px) for row in rows])))
        return torch.cat(features)

    def _reference_key(self, size_px: tuple[int, int]) -> str:
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{size_px} {self.told['weights_xxh3']['held_out']} {self.held_out.source.preprocess}".encode())  # type: ignore[union-attr]
        for row in self.rows:
            digest.update(_image_digest(row))
        return digest.hexdigest()


def weights_digest(tower: Any) -> str:
    """xxh3 of a tower's weights file: says in the table which weights a number comes from."""
    return storage.digest(tower.source.weights)[1]


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
