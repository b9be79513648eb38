"""Whole DMDR steps, phase by phase."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_t2i import build, reward_terms
from train_t2i.benchmark import BenchmarkConfig, settings_of
from train_t2i.benchmark.rows import Row, fresh, told
from train_t2i.compiled import check_compiler
from train_t2i.engine import AdamSettings, Engine, Flags
from train_t2i.families import family_of
from train_t2i.families.published import PUBLISHED
from train_t2i.feed import Feed, Prompts
from train_t2i.log import peak_memory_gib
from train_t2i.methods import METHODS, Method
from train_t2i.methods.base import Clock
from train_t2i.networks import Networks
from train_t2i.plan.floor import card_of
from train_t2i.plan.work import Counter


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


def prepare(config: BenchmarkConfig, row: Row, reward_batch_size: int = 0) -> Bench:
    settings = settings_of(config, row, reward_batch_size)
    if row.compile != "off":
        check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine = Engine(Flags(row.mixed_precision), row.backend)
    watch = Stopwatch(engine.device)
    if row.is_random:
        from train_t2i.full_size import random_family

        family: Any = random_family(PUBLISHED[row.model], settings.run, engine.dtype, engine.device)
    else:
        run = dataclasses.replace(settings.run, model_family=family_of(settings.run.pretrained_model))
        family = build.build_family(run, engine.dtype)
    family = family.to(engine.device)
    roles = METHODS["dmdr"]
    networks = build.assemble(
        settings, family, uses=roles.uses, trains=roles.trains, dtype=engine.dtype, place=engine.place,
        autocast=engine.autocast,
    )  # fmt: skip
    family.encode = watch.around("text_encoding", family.encode)
    built = reward_terms.build_terms(
        settings.method, engine.dtype, engine.device, "rewards" in settings.run.recomputed, settings.run.seed
    )
    terms = tuple(dataclasses.replace(term, score=watch.around("rewards_forward", term.score)) for term in built)
    method = build.build_method(settings, networks, engine.device, terms, calls_need_all=engine.calls_need_all)
    for role in roles.trains:
        networks.prepare(role, engine.prepare, AdamSettings(1e-8, (0.9, 0.999), 1e-8, 0.0, False))
    family.call = watch.around("network_forward", family.call)
    wrapped: Any = engine
    wrapped.backward = watch.around("backward", engine.backward)
    feed = Feed(Prompts(config.data_path_train), 0, config.batch_size)
    bench = Bench(engine, networks, method, feed, watch)
    if row.schedule == "published":
        from train_t2i.benchmark.published import compute_as_published

        compute_as_published(bench, config.batch_size)
    return bench


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


PARTS = ("network_forward", "backward")  # of the phases beside them


def measure(config: BenchmarkConfig, row: Row) -> dict[str, Any]:
    """One row.  FLOPs are counted in the first step, which is not timed; compiled code is made in one more."""
    bench = prepare(config, row)
    ticks, ratio = bench.feed.ticks(0), config.ratio_update
    compiled = row.compile != "off"
    as_written = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with as_written, Counter(bench.networks.family, bench.networks.modules) as counter:
        run_ticks(bench, ticks, ratio, ratio)
    flops = counter.take().network
    if compiled:
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
    in_network = sum(split.pop(name) for name in PARTS)
    split["rollout"] -= split.get("text_encoding", 0.0)
    split["generator_update"] -= split.get("rewards_forward", 0.0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    card = card_of(name) if row.mixed_precision != "no" else None
    return {
        "seconds_step": seconds,
        "seconds_tick": seconds / ratio,
        "seconds_of_a_step": split,
        "share_outside_network_calls": 1 - in_network / seconds,
        "images_per_second": config.batch_size * ratio * bench.engine.world / seconds,
        "network_calls_step": (bench.networks.num_calls - calls) / config.steps,
        "network_flops_step": flops,
        "network_flops_per_second": flops / seconds,
        "model_flop_utilisation": flops / seconds / card.flops if card else None,
        "peak_memory_gib": peak_memory_gib(device),
        "device": name,
    }


def rows(config: BenchmarkConfig, wanted: Sequence[Row]) -> Iterator[dict[str, Any]]:
    given, config = config, with_random_rewards(config) if config.random_rewards else config
    for row in wanted:
        settings = told(given, row)
        if config.num_processes == 1 and row.backend != "ddp":
            yield settings | {"refused": f"{row.backend} with one process is plain training (give --num-processes)"}
            continue
        yield settings | fresh(measure, (config, row), config.num_processes, config.row_limit_s)


def with_random_rewards(config: BenchmarkConfig) -> BenchmarkConfig:
    """The file of --random-rewards as both rewards, made where it is not there."""
    from train_t2i.engine import DTYPES
    from train_t2i.full_size import random_vit_h_14

    path = Path(str(config.random_rewards))
    if not path.exists():
        random_vit_h_14(path, DTYPES[config.mixed_precision.split(",")[0]])
    return dataclasses.replace(config, clip_reward_model=str(path), hpsv2_reward_model=str(path))
