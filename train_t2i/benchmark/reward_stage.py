"""The reward stage of a generator update alone: latents -> images -> scores -> the gradient of the latents.

Measured plainly, with gradient checkpointing, with one row at a time, and with both: seconds, the most bytes of tensors
alive beside weights (counted tensor by tensor, so that it is exact and the same on every device), and, row by row, the norm
of the gradient's difference from the plain one over the norm of that.  Rounding at a kink of the decoder moves a row by more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train_t2i.benchmark import BenchmarkConfig
from train_t2i.benchmark.rows import Row
from train_t2i.benchmark.step import Bench, prepare
from train_t2i.methods.dmdr import DMDR
from train_t2i.plan.ledger import Ledger

WAYS = ((False, 0), (True, 0), (False, 1), (True, 1))  # (gradient checkpointing, rows at a time; 0: all)
REPEATS = 3  # of which the shortest counts


def rows(config: BenchmarkConfig, row: Row) -> Iterator[dict[str, Any]]:
    """A row for each way; the first is the plain one."""
    plain: Tensor | None = None
    for checkpointing, size in WAYS:
        bench = prepare(config, replace(row, checkpointing=checkpointing), size)
        seconds, peak_bytes, gradient = measure(bench)
        plain = gradient if plain is None else plain
        off = (gradient - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        yield {
            "gradient_checkpointing": checkpointing,
            "rows_at_a_time": size or config.batch_size,
            "seconds": seconds,
            "peak_mb": peak_bytes / 1e6,
            "gradient_off_by": {"median_row": float(off.median()), "worst_row": float(off.max())},
        }


def measure(bench: Bench) -> tuple[float, int, Tensor]:
    """Seconds, peak bytes, gradient (B, C, H, W) of the same latents and prompts."""
    method = bench.method
    assert isinstance(method, DMDR)
    (batch,) = next(bench.feed.ticks(0))
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(len(batch.prompts), *method.setting.latent_shape, generator=draw).to(bench.engine.device)

    def gradient() -> Tensor:
        leaf = latents.clone().requires_grad_()
        loss, _ = method.rewards(leaf, batch.prompts, 0)
        (found,) = torch.autograd.grad(loss, leaf)
        return found

    gradient()  # prompts are encoded once
    with Ledger() as ledger:
        gradient()
    seconds = []
    for _ in range(REPEATS):
        start = bench.watch.now()
        found = gradient()
        seconds.append(bench.watch.now() - start)
    return min(seconds), ledger.peak.total, found.float().cpu()
