"""The tiny denoisers are trained by the trainer's own ``--method sft``, as users would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from shapes.world import code_digest


def pictures(work: Path, count: int, seed: int) -> Path:
    """The table of `count` rendered training scenes, made when it is missing."""
    folder = work / f"pictures-{count}-{seed}-{code_digest()}"
    return _rendered("scenes", count, seed, folder / "metadata.csv")


def edits(work: Path, count: int, seed: int) -> Path:
    """The table of `count` rendered training edits, every other one of any colours, made when it is missing."""
    folder = work / f"edits-{count}-{seed}-{code_digest('edits.py', 'edit_pictures.py', 'free_colours.py')}"
    return _rendered("edits", count, seed, folder / "metadata.json", "--free-colours")


def _rendered(module: str, count: int, seed: int, table: Path, *flags: str) -> Path:
    render = [sys.executable, "-m", f"shapes.{module}", "render", "--split", "train", "--count", str(count), *flags]
    if not table.exists():
        subprocess.run([*render, "--seed", str(seed), "--out", str(table.parent)], check=True)
    return table


def supervised(
    folder: Path,
    work: Path,
    recipe: Any,
    run_name: str,
    *,
    pictures_seed: int,
    table: Callable[[Path, int, int], Path] = pictures,
    more: dict[str, object] | None = None,
    legs: tuple[int, ...] = (),
    threads: int | None = None,
    processes: int = 1,
) -> Path:
    """Train the denoiser of the pipeline `folder` on the rows of `table`; the folder of the last checkpoint's generator.

    The run in `work`/`run_name` goes on where it stopped; another recipe needs another name.  With `legs` it is trained
    to the first of these steps, then on to the next by a run that starts there: each leg has a cosine of its own.
    Several processes share a batch; what is learnt is the same but for rounding.
    """
    flags: dict[str, object] = {
        "method": "sft",
        "pretrained-model": folder,
        "data-path-train": table(work, recipe.pictures, pictures_seed),
        "learning-rate-gen": recipe.learning_rate,
        "batch-size": recipe.batch_size // processes,
        "lr-scheduler": "cosine",
        "lr-warmup-steps": recipe.warmup,
        "caption-dropout": recipe.caption_dropout,
        "cache-rows": "on",
        "num-workers": 1,
        "mixed-precision": "no",
        "sample-steps": 0,
        "resolution": 64,
        "seed": recipe.seed,
        "output-dir": work,
        **(more or {}),
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    several = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *several, "-m", "train_t2i", "train", *words, "--auto-resume"]
    last: Path | None = None
    for steps in legs or (recipe.steps,):
        name = f"{run_name}-{steps}" if last else run_name
        start = ["--resume-ckpt", str(last)] if last else []
        leg = ["--exp-name", name, "--max-train-steps", str(steps), *start]
        subprocess.run([*command, *leg], check=True, env=environment)
        last = work / name / "checkpoints" / "torch_units" / f"step-{steps}.pt"
    assert last is not None
    return last.parents[1] / "accelerator_1" / last.stem


def install(trained: Path, folder: Path, kind: Any) -> None:
    """Replace the model of class `kind` in `folder` by the generator of the checkpoint `trained`, in half precision.

    A checkpoint holds parameters; buffers, such as SD3's table of positions, are what the configuration makes them.
    """
    model = kind.from_config(kind.load_config(folder))
    missing, unexpected = model.load_state_dict(load_file(trained / "model.safetensors"), strict=False)
    assert set(missing) <= {name for name, _ in model.named_buffers()}, missing
    assert not unexpected, unexpected
    fresh = folder.with_name(f"{folder.name}.partial")
    model.half().save_pretrained(fresh)
    shutil.rmtree(folder)
    fresh.rename(folder)
