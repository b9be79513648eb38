"""Tiny runs inside this process: those that verbs read, what tests look at in a run, and a command that is refused."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image

from train_t2i.__main__ import main
from train_t2i.checkpoint import RunFolder

RL = "--cold-start-iter 2 --clip-reward-model {clip} --hpsv2-reward-model {hpsv2} --reward-margin 2"
METHODS = {
    "dmdr": "--lora-rank 2 --learning-rate-gui 1e-3 --ratio-update 2 --cold-start-iter 1000 --cfg-r 3",
    "sft": "--num-workers 0",
    "arcflow": "",
}


def arguments(root: Path, name: str, more: str = "", method: str = "dmdr", *, model: Path, prompts: Path) -> list[str]:
    """Of a run of two steps at 32 px whose generator leaves the teacher."""
    return shlex.split(
        f"train --pretrained-model {model} --output-dir {root} --exp-name {name} --resolution 32 --mixed-precision no "
        f"--data-path-train {prompts} --batch-size 2 --batch-size-test 2 --learning-rate-gen 1e-3 "
        f"--teacher-num-steps 2 --max-train-steps 2 --checkpoint-steps 1 --sample-steps 1 "
        f"--method {method} {METHODS[method]} {more}"
    )


def train(root: Path, name: str, more: str = "", method: str = "dmdr", *, model: Path, prompts: Path) -> Path:
    """Run ``arguments`` to a good end; the run's folder."""
    assert main(arguments(root, name, more, method, model=model, prompts=prompts)) == 0
    return root / name


def record(root: Path, step: int) -> Path:
    """The commit record of a step."""
    return root / "checkpoints" / "torch_units" / f"step-{step}.pt"


def stopped_at(root: Path, step: int, name: str) -> Path:
    """A copy of a run as if it had been killed after saving ``step``: later logs and half a later checkpoint are there."""
    copy = root.with_name(name)
    shutil.copytree(root, copy)
    for later in (s for s in RunFolder(copy).steps() if s > step):
        record(copy, later).unlink()
    return copy


def weights(root: Path, step: int, part: str = "accelerator_1") -> dict[str, torch.Tensor]:
    return dict(tiny.checkpoint_files(root, step))[f"{part}/model.safetensors"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def refused(capsys, *arguments, code=2):
    """What a command that must not run says, in two lines at most."""
    assert main([*map(str, arguments)]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    told = said[said.index("error: ") :]  # a progress bar may stand before it
    assert len(told.splitlines()) <= 2
    return told


def pixels(path):
    """(H, W, 3) int."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).int()
