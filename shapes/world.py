"""The world as tensors: many pictures and captions at once, kept between runs, and batches of them by step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shapes.render import render
from shapes.scenes import Scene, rng_for, sample


@dataclass(frozen=True)
class World:
    """`pictures`: (N, 3, 64, 64) uint8; `scenes` and `captions`: N each."""

    pictures: Tensor
    scenes: list[Scene]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, index: Tensor) -> Tensor:
        """(B,) -> (B, 3, 64, 64) float in [0, 1]."""
        return self.pictures[index].float() / 255


def code_digest(*more: str) -> str:
    """Digest of the files that decide what a picture looks like, `more` among them, so that a stale store is never read."""
    here = Path(__file__).parent
    files = ("scenes.py", "render.py", *more)
    return hashlib.blake2b(b"".join((here / n).read_bytes() for n in files), digest_size=6).hexdigest()


def load_world(split: str, seed: int, count: int, store: Path | None = None) -> World:
    """Draw scenes 0 .. count-1 of a split; pictures are kept in the folder `store` when given."""
    drawn = [sample(split, seed, index) for index in range(count)]
    scenes, captions = [scene for scene, _ in drawn], [text for _, text in drawn]
    path = store / f"{split}-{seed}-{count}-{code_digest()}.npy" if store else None
    if path and path.exists():
        return World(torch.from_numpy(np.load(path)), scenes, captions)
    pixels = np.empty((count, 3, 64, 64), np.uint8)
    for index, scene in enumerate(scenes):
        pixels[index] = (render(scene, rng_for(split, seed, index, stream=1)) * 255 + 0.5).transpose(2, 0, 1)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, pixels)
        partial.replace(path)
    return World(torch.from_numpy(pixels), scenes, captions)


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The random numbers of one training step: a function of its counters, nothing else."""
    words = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


def batch_index(seed: int, step: int, size: int, total: int) -> Tensor:
    """(size,) sample numbers of one step."""
    return torch.randint(total, (size,), generator=generator(seed, step, stream=99))


def cosine(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Learning rate at a step: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
