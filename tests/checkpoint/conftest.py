"""A run folder, one with two steps, and no waiting for the disk."""

import os
from pathlib import Path

import pytest
from saved import save

from train_t2i.checkpoint import RunFolder


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flushes asked of the kernel, which are not waited for: a killed process loses nothing that was written."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def saved(run: RunFolder) -> RunFolder:
    save(run, 1)
    save(run, 2)
    return run
