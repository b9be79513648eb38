"""The four published launches of Qwen-Image-Edit's training, word by word, on tiny weights; then its bf16 export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_runs
import torch
from edit_models import picture, save_edit
from safetensors.torch import load_file
from test_asked import FSDP
from test_entries import PUBLISHED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
LAUNCHES = {
    "ddp": "--mixed_precision=bf16",
    "zero2": "--use_deepspeed --deepspeed_config_file config/zero_stage2_config.json --deepspeed_multinode_launcher standard",
    "zero3": "--zero_stage 3 --zero3_save_16bit_model true --zero3_init_flag true --use_deepspeed "
    "--deepspeed_config_file config/zero_stage3_config.json --deepspeed_multinode_launcher standard",
    "fsdp2": f"--mixed_precision=bf16 {FSDP}",
}
SMALL = {  # what the tiny world has otherwise
    "pretrained_model_name_or_path": "model", "train_data_dir": "data", "train_data_meta": "data/metadata.json",
    "image_sample_size": "64", "num_train_epochs": "2", "checkpointing_steps": "3", "lr_warmup_steps": "2",
    "dataloader_num_workers": "0",
}  # fmt: skip
ROWS = [(64, 64), (96, 64), (64, 64), (96, 64)]  # (width, height)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edit")
    save_edit(root / "model", "qwen_image_edit")
    (root / "data").mkdir()
    rows = []
    for i, (width, height) in enumerate(ROWS):
        for kind in ("target", "source"):
            picture(width, height, 2 * i + (kind == "source")).save(root / "data" / f"{kind}{i}.png")
        sources = [f"source{i}.png"]
        rows.append(
            {"file_path": f"target{i}.png", "source_file_path": sources, "text": "make it red", "type": "image"}
        )
    (root / "data" / "metadata.json").write_text(json.dumps(rows))
    for name in ("scripts", "config"):
        (root / name).symlink_to(ROOT / name)
    return root


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def small(words: list[str], backend: str) -> list[str]:
    """The published flags with this world's values."""
    values = SMALL | {"output_dir": f"out_{backend}"}
    names = [word.removeprefix("--").partition("=")[0] for word in words]
    assert values.keys() <= set(names)
    return [f"--{name}={values[name]}" if name in values else word for name, word in zip(names, words, strict=True)]


@pytest.mark.parametrize("backend", LAUNCHES)
def test_a_published_launch_trains_and_becomes_a_bf16_folder(backend: str, folder: Path) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    processes = [] if backend == "ddp" else ["--num_processes", "2", "--main_process_port", "0"]
    launch = [
        "-m",
        "accelerate.commands.launch",
        *processes,
        *LAUNCHES[backend].split(),
        "scripts/qwenimage/train_edit.py",
    ]
    flags = [*small(PUBLISHED, backend), "--source-size=64"]
    steps = 2 * len(ROWS) // (2 if processes else 1)
    run([*launch, *flags], folder)
    root = folder / f"out_{backend}"
    record = torch.load(tiny_runs.record(root, steps), weights_only=True)
    assert (record["backend"], record["world_size"]) == (backend, 2 if processes else 1)
    assert (record["settings"]["model_family"], record["settings"]["max_train_steps"]) == ("qwen_image_edit", steps)
    lines = tiny.log_lines(root)
    assert [line["lr"] for line in lines[:3]] == [1e-5, 2e-5, 2e-5]
    assert all(line["loss"] > 0 and line["skipped"] == 0 for line in lines)
    run([*launch, *flags, "--resume_from_checkpoint=latest"], folder)  # there is nothing left to do
    out = f"out_{backend}/checkpoint-{steps}-outputs"
    line = f"scripts/zero_to_bf16.py out_{backend}/checkpoint-{steps} {out} --max_shard_size 80GB --safe_serialization"
    run(line.split(), folder)
    saved = load_file(folder / out / "transformer" / "diffusion_pytorch_model.safetensors")
    masters = tiny_runs.weights(root, steps)
    assert saved.keys() == masters.keys()
    assert all(torch.equal(saved[key], masters[key].bfloat16()) for key in masters)
    assert json.loads((folder / out / "model_index.json").read_text())["_class_name"] == "QwenImageEditPipeline"
