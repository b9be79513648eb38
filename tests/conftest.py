"""Shared by all tests: no network, one thread a test, tiny models made once, training runs inside this process."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads do not survive a fork
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer import Trainer, flags_of, remember_models


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny operators only lose time on more threads; slow tests keep theirs."""
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("slow"):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread_before_a_fork() -> Iterator[None]:
    """OpenMP's threads do not survive a fork: a child waits for them for ever.  For slow tests that fork."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


# -- tiny models and data, made once ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def sdxl_folder(store: Path) -> Path:
    import tiny

    return tiny.save_sdxl(store / "sdxl")


@pytest.fixture(scope="session")
def sdxl_folder_2(store: Path) -> Path:
    """Another architecture: other widths, depths and VAE factor."""
    import tiny

    return tiny.save_sdxl(store / "sdxl-2", seed=5, second_config=True)


@pytest.fixture(scope="session")
def sdxl_folder_3(store: Path) -> Path:
    """The first architecture with other weights."""
    import tiny

    return tiny.save_sdxl(store / "sdxl-3", seed=9)


@pytest.fixture(scope="session")
def tiny_vae_folder(store: Path) -> Path:
    import tiny

    return tiny.save_tiny_vae(store / "tiny-vae")


@pytest.fixture(scope="session")
def towers(store: Path) -> dict[str, Path]:
    """Reward name -> folder."""
    from reward_towers import MODES, write_folder

    return {name: write_folder(store / f"tower-{name}", name) for name in MODES}


@pytest.fixture(scope="session")
def prompts_file(store: Path) -> Path:
    import tiny

    return tiny.save_prompts(store / "prompts.txt")


@pytest.fixture(scope="session")
def images_table(store: Path) -> Path:
    import tiny

    return tiny.save_images(store / "images")


@pytest.fixture(scope="session")
def pairs_folder(store: Path, sdxl_folder: Path, prompts_file: Path) -> Path:
    from train_t2i import pairs

    out = store / "pairs"
    arguments = (
        f"--out {out} --pretrained-model {sdxl_folder} --data-path-train {prompts_file} --count 8 "
        "--num-inference-steps 2 --cfg-scale 2 --resolution 32 --shard-size 3 --mixed-precision no"
    )
    assert pairs.main(shlex.split(arguments)) == 0
    return out


@pytest.fixture
def models_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_models(monkeypatch.setattr)


# -- training inside this process ------------------------------------------------------------------------------------


@pytest.fixture
def trainer(
    tmp_path: Path,
    sdxl_folder: Path,
    tiny_vae_folder: Path,
    prompts_file: Path,
    images_table: Path,
    pairs_folder: Path,
    models_from_memory: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Trainer:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a process that ends loses nothing that was written
    flags = flags_of(tmp_path, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder)

    def say() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return Trainer(tmp_path, flags, say)


@pytest.fixture
def first(trainer: Trainer) -> Path:
    """A run of two steps."""
    return trainer.run("first", "--batch-size 1")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path, prompts_file: Path) -> dict[str, Path]:
    """Runs that verbs read; nothing may change them."""
    import tiny_runs

    root = tmp_path_factory.mktemp("runs")
    flags = {"one": "", "four": "--sample-num-steps 4", "lora": "--use-lora-gen"}
    return {
        name: tiny_runs.train(root, name, more, model=sdxl_folder, prompts=prompts_file) for name, more in flags.items()
    }
