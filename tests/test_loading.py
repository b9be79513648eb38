"""A frozen network is in the host's memory once: in the file's own pages, which all processes of a machine share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from flow_models import save_flow

from train_t2i.families import load_family

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
    family = load_family("auto", str(folder), dtype=torch.bfloat16)
    before = own_bytes()
    net = family.load(torch.bfloat16)
    assert sum(p.nbytes for p in net.parameters()) == size
    assert all(not p.any() for p in net.parameters())  # read, so that its pages are there
    as_it_is = own_bytes() - before
    converted = family.load(torch.float32)
    taken = own_bytes() - before - as_it_is
    assert as_it_is < 0.25 * size
    assert taken > 1.5 * size, "fp32 copies are its own: what the measurement can see"
    del converted
