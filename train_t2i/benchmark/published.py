"""A DMDR step as its authors' trainer computes it, and as this one does: one process, the same weights, prompts and draws.

Theirs has a backbone of its own for the generator, all text encoders in every tick, the whole simulation whatever levels
were drawn, guidance in two calls, and keeps every activation.  Both come to the same gradients: a row says how far they are
apart.  ``network_forward`` and ``backward`` are parts of the phases beside them.  Repeats alternate and the shortest counts, so that whatever else the machine does hits both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from train_t2i.benchmark import BenchmarkConfig
from train_t2i.benchmark.rows import Row
from train_t2i.benchmark.step import Bench, prepare, run_ticks
from train_t2i.families.base import Cond
from train_t2i.methods import Batch
from train_t2i.plan.ledger import Ledger
from train_t2i.randomness import Draw
from train_t2i.sampling import rows_at


@dataclass(frozen=True)
class Schedule:
    """What a step computes."""

    layout: str
    computed: str  # as which trainer
    text_every_tick: bool
    checkpointing: bool = False


SCHEDULES = {
    "published": Schedule("paired_lora", "published", text_every_tick=True),
    "ours": Schedule("shared", "ours", text_every_tick=False),
    "ours, checkpointed": Schedule("shared", "ours", text_every_tick=False, checkpointing=True),
}


def halves(cond: Cond) -> tuple[Cond, Cond]:
    """(2B) rows -> the first B and the last B."""

    def half(part: Tensor | None, i: int) -> Tensor | None:
        return None if part is None else part.chunk(2)[i]

    first, last = (
        replace(
            cond, tokens=cond.tokens.chunk(2)[i], pooled=half(cond.pooled, i), mask=half(cond.mask, i),
            guidance=half(cond.guidance, i), context=tuple(part.chunk(2)[i] for part in cond.context),
        )
        for i in (0, 1)
    )  # fmt: skip
    return first, last


def in_halves(call: Callable[..., Tensor], batch_size: int) -> Callable[..., Tensor]:
    """``Family.call`` that makes two of one with twice the rows of a batch."""

    def called(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if len(x_t) <= batch_size:
            return call(net, x_t, t, cond)
        parts = zip(x_t.chunk(2), t.chunk(2), halves(cond), strict=True)
        return torch.cat([call(net, *part) for part in parts])

    return called


def simulated_whole(method: Any) -> Callable[..., Tensor]:
    """``DMDR._simulated`` that makes every call for every row, whatever was drawn, and picks afterwards."""
    networks, path, setting = method.networks, method.path, method.setting

    def simulated(cond: Cond, draw: Draw, level: Tensor) -> Tensor:
        x, found = draw.normal("simulation/0", setting.latent_shape), []
        for i in range(len(setting.grid) - 1):
            t, s = rows_at(setting.grid[i], x), rows_at(setting.grid[i + 1], x)
            found.append(networks.x0("generator", x, t, cond).float())
            x = path.step(x, found[-1], t, s, draw.normal(f"simulation/{i + 1}", setting.latent_shape))
        return torch.stack(found)[level.to(x.device), torch.arange(len(level), device=x.device)]

    return simulated


def remembered(encode: Callable[..., Cond]) -> Callable[..., Cond]:
    """``Family.encode`` that encodes a batch once: what a prompt cache does ahead of a run."""
    found: dict[tuple[str, ...], Cond] = {}

    def encoded(prompts: Sequence[str], *rest: Any) -> Cond:
        key = tuple(prompts)
        if key not in found:
            found[key] = encode(prompts, *rest)
        return found[key]

    return encoded


def compute_as_published(bench: Bench, batch_size: int) -> None:
    """The whole simulation, and guidance in two calls."""
    family: Any = bench.networks.family
    method: Any = bench.method
    family.call = in_halves(family.call, batch_size)
    method._simulated = simulated_whole(method)


def bench_of(config: BenchmarkConfig, row: Row, schedule: Schedule) -> Bench:
    """A bench that computes as ``schedule`` says."""
    own = replace(row, layout=schedule.layout, checkpointing=schedule.checkpointing, schedule=schedule.computed)
    bench = prepare(config, own)
    family: Any = bench.networks.family
    if not schedule.text_every_tick:
        family.encode = remembered(family.encode)
    return bench


@contextmanager
def counted(bench: Bench) -> Iterator[list[int]]:
    """The rows of each network call that is made inside, but for a backward pass's recomputation."""
    family: Any = bench.networks.family
    call, seen = family.call, []

    def noted(net: nn.Module, x_t: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x_t))
        return call(net, x_t, *rest)

    family.call = noted
    yield seen
    family.call = call


def gradients(bench: Bench, ticks: Sequence[list[Batch]]) -> dict[str, Tensor]:
    """Role -> the gradient of its last update of a step, as one vector."""
    backend: Any = bench.engine.backend
    found, norm = {}, backend.gradient_norm

    def noted(role: str, scale: float) -> Tensor:
        made = norm(role, scale)
        found[role] = torch.cat([g.grad.flatten().clone() for g in backend.tensors[role]])
        return made

    backend.gradient_norm = noted
    run_ticks(bench, iter(ticks), len(ticks), len(ticks))
    backend.gradient_norm = norm
    return found


def weight_bytes(bench: Bench, schedule: Schedule) -> int:
    """Of the networks, and of the text encoders where every tick needs them."""
    modules = list(bench.networks.modules.values())
    if schedule.text_every_tick:
        family: Any = bench.networks.family
        modules += [part for part in family.pipe.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def rows(config: BenchmarkConfig, row: Row) -> Iterator[dict[str, Any]]:
    """A row a schedule; the first is the published one, which the others are compared with."""
    benches = {name: bench_of(config, row, schedule) for name, schedule in SCHEDULES.items()}
    ticks = {name: list(islice(bench.feed.ticks(0), config.ratio_update)) for name, bench in benches.items()}
    made = {name: gradients(bench, ticks[name]) for name, bench in benches.items()}  # and warm
    peaks: dict[str, int] = {}
    network_rows: dict[str, int] = {}
    best: dict[str, dict[str, float]] = {}
    for name, bench in benches.items():
        with Ledger() as ledger, counted(bench) as seen:
            run_ticks(bench, iter(ticks[name]), config.ratio_update, config.ratio_update)
        network_rows[name] = sum(seen)
        peaks[name] = ledger.peak.total + weight_bytes(bench, SCHEDULES[name])
    for _ in range(config.steps):
        for name, bench in benches.items():
            took = timed(bench, ticks[name])
            best[name] = min(best.get(name, took), took, key=lambda split: split["step"])
    theirs = best["published"]["step"]
    for name, split in best.items():
        seconds = split.pop("step")
        yield {
            "schedule": name,
            "seconds_step": seconds,
            "seconds_of_a_step": split,
            "share_outside_network_calls": 1 - (split["network_forward"] + split["backward"]) / seconds,
            "rows_through_the_network_step": network_rows[name],
            "peak_mb": peaks[name] / 1e6,
            "of_published": {"seconds": seconds / theirs, "peak": peaks[name] / peaks["published"]},
            "gradient_off_by": {
                role: float((vector - made["published"][role]).norm() / made["published"][role].norm())
                for role, vector in made[name].items()
            },
        }


def timed(bench: Bench, ticks: Sequence[list[Batch]]) -> dict[str, float]:
    """Seconds of a step by phase, and of all of it."""
    bench.watch.seconds.clear()
    start = bench.watch.now()
    run_ticks(bench, iter(ticks), len(ticks), len(ticks))
    return {**bench.watch.seconds, "step": bench.watch.now() - start}
