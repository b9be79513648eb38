"""Tiny runs for the tests of verbs that read them: trained in this process, a few seconds together."""

from __future__ import annotations

import shlex
from pathlib import Path

METHODS = {
    "dmdr": "--lora-rank 2 --learning-rate-gui 1e-3 --ratio-update 2 --cold-start-iter 1000 --cfg-r 3",
    "sft": "--num-workers 0",
}


def train(root: Path, name: str, more: str = "", method: str = "dmdr", *, model: Path, prompts: Path) -> Path:
    """A run of two steps at 32 px whose generator has left the teacher; its folder."""
    from train_t2i.__main__ import main

    flags = (
        f"train --pretrained-model {model} --output-dir {root} --exp-name {name} --resolution 32 --mixed-precision no "
        f"--data-path-train {prompts} --batch-size 2 --batch-size-test 2 --learning-rate-gen 1e-3 "
        f"--teacher-num-steps 2 --max-train-steps 2 --checkpoint-steps 1 --sample-steps 1 "
        f"--method {method} {METHODS[method]} {more}"
    )
    assert main(shlex.split(flags)) == 0
    return root / name
