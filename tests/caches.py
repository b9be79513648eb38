"""Encoders that only pretend, and what tests look at in a cache's folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from train_t2i import build
from train_t2i.cache import main
from train_t2i.families.base import Cond
from train_t2i.mapped import replacing


def make_cache(root: Path, prompts: Sequence[str], family: FakeText, shard_size: int) -> Path:
    """The folder of a cache of ``prompts``, encoded one by one by ``family``."""
    (root / "p.txt").write_text("\n".join(prompts) + "\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "build_family", lambda run, dtype: family)
        patched.setattr(os, "fsync", lambda descriptor: None)
        flags = ["--family", "sdxl", "--mixed-precision", "bf16", "--shard-size", str(shard_size), "--batch-size", "1"]
        assert main(["--out", str(root / "out"), "--data-path-train", str(root / "p.txt"), *flags]) == 0
    return root / "out"


class FakeText:
    """A family as far as its text goes: numbers that a prompt's letters seed; ``masks``: padding is not attended to."""

    def __init__(self, *, masks: bool, pooled: int = 0, guidance: float | None = None, width: int = 12) -> None:
        self.masks, self.pooled, self.guidance, self.width = masks, pooled, guidance, width
        self.text_length, self.calls = 16, list[list[str]]()
        self.pipe: Any = SimpleNamespace(config={}, prompt_template_encode="say {}", prompt_template_encode_start_idx=3)

    def to(self, device: torch.device) -> FakeText:
        return self

    def row(self, prompt: str) -> Tensor:
        """(L, D): a token a letter, and one more."""
        generator = torch.Generator().manual_seed(sum(prompt.encode()) + 1)
        return torch.randn(1 + len(prompt), self.width, generator=generator).bfloat16()

    def encode(self, prompts: Sequence[str], negative: str | None = None, sources: Sequence[Any] = ()) -> Cond:
        self.calls.append(list(prompts))
        rows = [self.row(prompt)[: self.text_length] for prompt in prompts]
        longest = max(map(len, rows)) if self.masks else self.text_length
        tokens = torch.zeros(len(rows), longest, self.width, dtype=torch.bfloat16)
        if not self.masks:  # what T5 makes of padding: it changes from token to token, a little
            tokens += torch.randn(self.width) + torch.arange(longest)[:, None] / 512
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        pooled = torch.stack([row[0].repeat(self.pooled)[: self.pooled] for row in rows]) if self.pooled else None
        away = self.encode([negative] * len(prompts)) if negative is not None else None
        return self.complete(Cond(tokens, pooled, mask if self.masks else None, away))

    def complete(self, cond: Cond) -> Cond:
        told = None if self.guidance is None else torch.full((len(cond.tokens),), self.guidance)
        return replace(cond, guidance=told)


def files_of(folder: Path) -> dict[str, bytes]:
    """All that is in a cache's folder, without the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def flip(path: Path, at: int) -> None:
    """Change one bit of a byte; from the end where ``at`` is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def left_by_a_dead_process(path: Path) -> None:
    """A child is killed while it writes the file, as by kill -9."""
    child = os.fork()
    if child == 0:
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
