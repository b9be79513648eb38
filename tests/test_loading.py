"""A frozen network is in the host's memory once: in the file's own pages, which all processes of a machine share.

Run as a program this file loads a network in a process of its own: one that ran other tests fills memory that it took before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from flow_models import save_flow

from train_t2i.families import load_family

ROOT = Path(__file__).parents[1]

KB = 1024
LARGE_BYTES = 32 << 20  # well above what loading takes for itself


def own_bytes() -> int:
    """This process's memory that no file stands behind."""
    with Path("/proc/self/smaps_rollup").open() as lines:
        return next(int(line.split()[1]) * KB for line in lines if line.startswith("Anonymous:"))


def enlarge(folder: Path, kind: type, **config: object) -> int:
    """Give a pipeline folder a denoiser of a few ten MB in bf16; returns its bytes."""
    small = kind.load_config(folder)  # type: ignore[attr-defined]
    with torch.device("meta"):
        net = kind.from_config({**small, **config})  # type: ignore[attr-defined]
    net = net.to_empty(device="cpu").to(torch.bfloat16).requires_grad_(False)
    for parameter in net.parameters():
        parameter.zero_()
    net.save_pretrained(folder)
    return sum(p.nbytes for p in net.parameters())


def taken_by_loading(folder: str) -> dict[str, int]:
    """Bytes of the network, and what a process takes for it in bf16, as it is on the disk, and then in fp32."""
    family = load_family("auto", folder, dtype=torch.bfloat16)
    before = own_bytes()
    net = family.load(torch.bfloat16)
    assert all(not p.any() for p in net.parameters())  # read, so that its pages are there
    as_it_is = own_bytes() - before
    converted = family.load(torch.float32)
    fp32 = own_bytes() - before - as_it_is
    del converted
    return {"size": sum(p.nbytes for p in net.parameters()), "as_it_is": as_it_is, "fp32": fp32}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_weights_in_their_own_format_take_no_memory_of_a_process(name, tmp_path) -> None:
    if name == "sdxl":
        folder = tiny.save_sdxl(tmp_path / name)
        size = enlarge(folder / "unet", UNet2DConditionModel, block_out_channels=(64, 512))
    else:
        folder = save_flow(tmp_path / name, name)
        heads = {"num_attention_heads": 32, "attention_head_dim": 32, "caption_projection_dim": 1024}
        size = enlarge(folder / "transformer", SD3Transformer2DModel, **heads)
    assert size > LARGE_BYTES
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    taken = json.loads(done.stdout.splitlines()[-1])
    assert taken["size"] == size
    assert taken["as_it_is"] < 0.25 * size
    assert taken["fp32"] > 1.5 * size, "fp32 copies are its own: what the measurement can see"


if __name__ == "__main__":
    print(json.dumps(taken_by_loading(sys.argv[1])))
