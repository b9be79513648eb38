"""Once at full size: SDXL's 2.6 billion parameters and two ViT-H-14 rewards, random weights, one whole DMDR step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from train_t2i import benchmark, log
from train_t2i.benchmark import step
from train_t2i.benchmark.rows import Row
from train_t2i.engine import Engine
from train_t2i.full_size import random_vit_h_14

# Weights rest in bf16, arithmetic is fp32: without bf16 instructions torch's backward of a bf16 linear layer runs at
# 1 GFLOP/s, sixty times slower.
MULTIPLY = [
    *((torch.nn.functional, name) for name in ("linear", "conv2d", "layer_norm", "group_norm")),
    (torch.nn.functional, "scaled_dot_product_attention"), (torch, "matmul"), (torch, "cat"), (torch.Tensor, "__matmul__"),
]  # fmt: skip


def wide(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(
        *(widened(a) for a in args), **{key: widened(a) for key, a in kwargs.items()}
    )


def widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        return value.float()
    return [widened(item) for item in value] if isinstance(value, list | tuple) else value


def available_gib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(available_gib() < 15, reason="needs 15 GiB of free memory")
def test_one_step_of_sdxl_with_both_rewards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared layout: one copy of the base serves three roles; only the two adapters move."""
    tower = str(random_vit_h_14(tmp_path / "random_vit_h_14.safetensors", torch.bfloat16))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lighthouse at dusk\n")
    config = benchmark.BenchmarkConfig(
        models="sdxl", data_path_train=str(prompts), resolution="128", batch_size=1, ratio_update=1, lora_rank=4,
        mixed_precision="bf16", clip_reward_model=tower, hpsv2_reward_model=tower,
    )  # fmt: skip
    monkeypatch.setattr(Engine, "autocast", lambda self: nullcontext())
    for owner, name in MULTIPLY:
        monkeypatch.setattr(owner, name, wide(getattr(owner, name)))
    bench = step.prepare(config, Row("sdxl", "shared", mixed_precision="bf16", checkpointing=True))
    assert sum(p.numel() for p in bench.networks.modules["base"].parameters()) > 2.56e9
    before = {role: [p.detach().clone() for p in bench.networks.parameters(role)] for role in bench.method.trains}
    start = time.perf_counter()
    step.run_ticks(bench, bench.feed.ticks(0), 1, 1)
    seconds = time.perf_counter() - start
    for role in bench.method.trains:
        after = bench.networks.parameters(role)
        assert all(torch.isfinite(p).all() for p in after)
        assert any(not torch.equal(a, b) for a, b in zip(after, before[role], strict=True))
    told = {"seconds_step": seconds, "peak_memory_gib": log.peak_memory_gib(torch.device("cpu"))}
    with capsys.disabled():
        print(f"\nfull-size SDXL step on CPU: {json.dumps(told | {'split': dict(bench.watch.seconds)})}")
