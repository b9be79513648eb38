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
from train_t2i.families.base import Source
from train_t2i.pictures import fit_image
from train_t2i.rows import Row, load_rows
from train_t2i.student import default_device

if TYPE_CHECKING:
    from train_t2i.evaluate import EvaluateConfig

Score = Callable[..., Tensor]  # (images, prompts), for edits with the sources -> (B,)
REFERENCE_BATCH = 64
REFERENCE_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of a reference folder
COLUMN_OF = {"hpsv2": "hps"}  # reward -> column, where the table has another word for it
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


def wanted_rewards(config: EvaluateConfig) -> dict[str, tuple[str, str]]:
    """Column -> (reward, path of its weights), from ``--rewards`` and the flags of two of them.  Raises UserError."""
    given = [("clip", config.clip_reward_model), ("hpsv2", config.hpsv2_reward_model)]
    for part in (config.rewards or "").split(",") if config.rewards else ():
        kind, equals, path = part.strip().partition("=")
        if not equals or not path:
            raise UserError(f"--rewards {part}: not NAME=PATH", "e.g. --rewards clip=FILE,hpsv2=FILE")
        if kind not in rewards.REWARDS:
            raise UserError(f"--rewards {part}: no such reward", f"one of {', '.join(rewards.REWARDS)}")
        given.append((kind, path))
    wanted: dict[str, tuple[str, str]] = {}
    for kind, weights in given:
        if weights is None:
            continue
        column = COLUMN_OF.get(kind, kind)
        if column in wanted:
            raise UserError(f"--rewards {kind}={weights}: the reward {kind} is given twice", "leave one out")
        wanted[column] = kind, weights
    return wanted


def reference_rows(reference: str, count: int) -> list[Row]:
    """The rows of a table, or the images of a folder in the order of their names.  Raises UserError."""
    folder = Path(reference)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in REFERENCE_KINDS and path.is_file())
        rows = [Row(folder, number, path, "") for number, path in enumerate(files, 1)]
    else:
        rows = load_rows(reference)
    if len(rows[: count or None]) < MIN_ROWS:
        raise UserError(f"--reference {reference}: {len(rows[: count or None])} rows", f"give {MIN_ROWS} at least")
    return rows[: count or None]


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
        self.rows = reference_rows(config.reference, config.reference_count) if config.reference else []
        wanted = wanted_rewards(config)
        self.rewards = {name: load_reward(kind, path, self.device) for name, (kind, path) in wanted.items()}
        self.held_out = load_reward("clip", config.held_out_model, self.device) if config.held_out_model else None
        self.reference: Tensor | None = None  # (N, D)
        self._reference_px: tuple[int, int] | None = None
        weighed = wanted | ({"held_out": ("clip", config.held_out_model)} if config.held_out_model else {})
        self.told: dict[str, Any] = {
            "scorer": config.scorer,
            "clip": None,
            "hps": None,
            **{name: path for name, (_, path) in wanted.items()},
            "magic_prompt": config.magic_prompt,
            "held_out": config.held_out_model,
            "reference": config.reference,
            "reference_count": len(self.rows),
            "weights_xxh3": {name: weights_digest(kind, path) for name, (kind, path) in weighed.items()},
        }

    def _towers(self) -> dict[str, Any]:
        return self.rewards | ({"held_out": self.held_out} if self.held_out is not None else {})

    def identity(self, score: str) -> str:
        """What a score is computed with; scores of two models are compared where it is the same."""
        if score == "adherence":
            return str(self.config.scorer)
        weights = self.told["weights_xxh3"]["held_out" if score == "diversity" else score]
        return f"{weights} {self.config.magic_prompt}".strip() if score == "hps" else weights

    @torch.no_grad()
    def scores(
        self, images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Source]] = ()
    ) -> dict[str, Tensor]:
        """Column name -> (B,) fp32, in the order of the table."""
        found: dict[str, Tensor] = {}
        if self.adherence is not None:
            found["adherence"] = self._adherence(images.cpu(), prompts, sources)
        prefix = self.config.magic_prompt
        for name, tower in self._towers().items():
            told = [f"{prefix} {prompt}" for prompt in prompts] if name == "hps" and prefix else prompts
            found[name] = tower(images, told).float().cpu()
        return found

    def _adherence(self, images: Tensor, prompts: Sequence[str], sources: Sequence[Sequence[Source]]) -> Tensor:
        """An edit is judged beside what it starts from: each row's sources as (3, h, w) in [0, 1]."""
        assert self.adherence is not None
        told = ([[source.pixels.float() / 255 for source in row] for row in sources],) if sources else ()
        try:
            scores = torch.as_tensor(self.adherence(images, list(prompts), *told), dtype=torch.float32).cpu()
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


def weights_digest(kind: str, weights: str) -> str:
    """xxh3 of a reward's weights file: says in the table which weights a number comes from."""
    return storage.digest(Path(rewards.inspect_weights(kind, weights).path))[1]


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
