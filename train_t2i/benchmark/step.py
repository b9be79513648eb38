"""Whole DMDR steps, phase by phase: one row a layout and a checkpointing choice."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from train_t2i import build, reward_terms
from train_t2i.benchmark import BenchmarkConfig, settings_of
from train_t2i.config import Settings
from train_t2i.engine import AdamSettings, Engine, Flags
from train_t2i.feed import Feed, Prompts
from train_t2i.log import peak_memory_gib
from train_t2i.methods import METHODS, Method
from train_t2i.methods.base import Clock
from train_t2i.networks import Networks


class Stopwatch:
    """Seconds by name; waits for the device, so that a phase pays for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return timed


@dataclass
class Bench:
    """One configuration, ready to run."""

    engine: Engine
    networks: Networks
    method: Method
    feed: Feed
    watch: Stopwatch


def prepare(config: BenchmarkConfig, settings: Settings) -> Bench:
    checkpointing = settings.run.recomputes
    engine = Engine(Flags(config.mixed_precision))
    watch = Stopwatch(engine.device)
    if config.size == "sdxl":
        from train_t2i.full_size import random_sdxl

        family: Any = random_sdxl(engine.dtype, checkpoint_decoder=checkpointing)
    else:
        family = build.build_family(settings.run, engine.dtype)
    family = family.to(engine.device)
    roles = METHODS["dmdr"]
    networks = build.assemble(
        settings, family, uses=roles.uses, trains=roles.trains, dtype=engine.dtype, place=engine.place,
        autocast=engine.autocast,
    )  # fmt: skip
    family.encode = watch.around("text_encoding", family.encode)
    built = reward_terms.build_terms(settings.method, engine.dtype, engine.device, checkpointing, settings.run.seed)
    terms = tuple(dataclasses.replace(term, score=watch.around("rewards_forward", term.score)) for term in built)
    method = build.build_method(settings, networks, engine.device, terms)
    for role in roles.trains:
        networks.prepare(role, engine.prepare, AdamSettings(1e-8, (0.9, 0.999), 1e-8, 0.0, False))
    feed = Feed(Prompts(config.data_path_train), 0, config.batch_size)
    return Bench(engine, networks, method, feed, watch)


def run_ticks(bench: Bench, ticks: Iterator[Any], num_ticks: int, ratio: int) -> None:
    """The trainer's loop, phase by phase."""
    for tick in range(num_ticks):
        clock = Clock(tick, tick // ratio, tick % ratio)
        with bench.watch.phase("data"):
            (batch,) = next(ticks)
        with bench.watch.phase("rollout"):
            rollout = bench.method.rollout(batch, clock)
        for role in bench.method.roles_at(clock):
            with bench.watch.phase(f"{role}_update"), bench.networks.updating(role):
                for loss, _ in bench.method.losses(role, rollout, clock):
                    bench.engine.backward(role, loss)
                bench.engine.step(role)


def measure(config: BenchmarkConfig, layout: str, checkpointing: bool) -> dict[str, Any]:
    """One row."""
    bench = prepare(config, settings_of(config, layout, checkpointing))
    ticks, ratio = bench.feed.ticks(0), config.ratio_update
    run_ticks(bench, ticks, ratio, ratio)
    device = bench.engine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bench.watch.seconds.clear()
    calls = bench.networks.num_calls
    start = bench.watch.now()
    run_ticks(bench, ticks, ratio * config.steps, ratio)
    seconds = (bench.watch.now() - start) / config.steps
    split = {name: total / config.steps for name, total in sorted(bench.watch.seconds.items())}
    split["rollout"] -= split["text_encoding"]
    split["generator_update"] -= split.get("rewards_forward", 0.0)
    return {
        "layout": layout,
        "gradient_checkpointing": checkpointing,
        "seconds_step": seconds,
        "seconds_tick": seconds / ratio,
        "seconds_of_a_step": split,
        "images_per_second": config.batch_size * ratio / seconds,
        "network_calls_step": (bench.networks.num_calls - calls) / config.steps,
        "peak_memory_gib": peak_memory_gib(device),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
    }


def rows(config: BenchmarkConfig, layouts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for layout in layouts:
        for checkpointing in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # so that peak memory is its own
                yield fresh.submit(measure, config, layout, checkpointing).result()
