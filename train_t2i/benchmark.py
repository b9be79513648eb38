"""``python -m train_t2i benchmark``: where the time and the memory of a DMDR step go, as JSON.

One row a layout and a checkpointing choice: seconds a tick and a step, split into data, text encoding, rollout, guidance
update, generator update and rewards (the last is part of the generator update's wall time and is taken out of it),
images a second, network calls a step, peak memory.  ``--size sdxl`` takes a randomly initialised SDXL and ViT-H-14 towers.
``--part rewards`` measures what comes after the network alone: decoding, scoring, and the gradient back to the latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from train_t2i import build, reward_terms
from train_t2i.cli import parse_verb
from train_t2i.config import LAYOUTS, Config, DMDRConfig, Settings, flag
from train_t2i.config_checks import check
from train_t2i.engine import DTYPES, AdamSettings, Engine, Flags
from train_t2i.errors import EXIT_DISK, EXIT_DONE, UserError
from train_t2i.feed import Feed, Prompts
from train_t2i.full_size import random_sdxl, random_vit_h_14
from train_t2i.log import peak_memory_gib
from train_t2i.methods import METHODS, Method
from train_t2i.methods.base import Clock
from train_t2i.networks import Networks
from train_t2i.storage import write_atomically


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time DMDR steps in every layout, with and without gradient checkpointing."""

    size: str = flag(
        "folder", "folder: the model of --pretrained-model; sdxl: random, full size", choices=("folder", "sdxl")
    )
    pretrained_model: str = flag("stabilityai/stable-diffusion-xl-base-1.0", "teacher")
    tiny_vae: str | None = flag(None, "AutoencoderTiny whose decoder serves rewards")
    clip_reward_model: str | None = flag(None, "CLIP reward")
    hpsv2_reward_model: str | None = flag(None, "HPSv2.1 reward")
    data_path_train: str = flag("prompts.txt", "prompts")
    part: str = flag("step", "what is measured: whole steps, or the reward stage of one", choices=("step", "rewards"))
    layouts: str = flag(",".join(LAYOUTS), "comma list")
    resolution: str = flag("1024", "image size in pixels")
    sample_num_steps: int = flag(1, "network calls of the student", low=1)
    ratio_update: int = flag(5, "guidance updates a generator update", low=1)
    batch_size: int = flag(8, "rows", low=1)
    lora_rank: int = flag(32, "LoRA rank of the guidance network", low=1)
    mixed_precision: str = flag("fp16", "number format of the network calls", choices=("no", "fp16", "bf16"))
    steps: int = flag(3, "generator steps that are timed, after one that is not", low=1)
    out: str | None = flag(None, "JSON file to write")


OF_WHOLE_STEPS = (
    "layouts",
    "sample_num_steps",
    "ratio_update",
    "lora_rank",
    "steps",
)  # which rewards alone have none of


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


def settings_of(config: BenchmarkConfig, layout: str, checkpointing: bool, reward_batch_size: int = 0) -> Settings:
    """The settings of one row, checked as the trainer checks them."""
    rewarded = config.clip_reward_model or config.hpsv2_reward_model
    adapted = any(adapter for _, adapter in LAYOUTS[layout].values())
    run = Config(
        pretrained_model=config.pretrained_model, tiny_vae=config.tiny_vae, resolution=config.resolution,
        sample_num_steps=config.sample_num_steps, layout=layout, use_lora_gen=LAYOUTS[layout]["generator"][1] is not None,
        lora_rank=config.lora_rank if adapted else Config.lora_rank, batch_size=config.batch_size, mixed_precision=config.mixed_precision,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    method = DMDRConfig(
        ratio_update=config.ratio_update, cold_start_iter=0 if rewarded else run.max_train_steps,
        clip_reward_model=config.clip_reward_model, hpsv2_reward_model=config.hpsv2_reward_model,
        reward_batch_size=reward_batch_size,
    )  # fmt: skip
    settings = Settings(run, method)
    check(settings)
    return settings


def prepare(config: BenchmarkConfig, settings: Settings) -> Bench:
    checkpointing = settings.run.gradient_checkpointing
    engine = Engine(Flags(config.mixed_precision))
    watch = Stopwatch(engine.device)
    if config.size == "sdxl":
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


def write(config: BenchmarkConfig, rows: list[dict[str, Any]]) -> None:
    """The JSON of the rows so far."""
    if not config.out:
        return
    text = json.dumps({"settings": dataclasses.asdict(config), "rows": rows}, indent=1) + "\n"
    try:
        write_atomically(Path(config.out), text)
    except OSError as error:
        raise UserError(
            f"--out {config.out}: cannot be written ({error.strerror})", "choose another file, or make room", EXIT_DISK
        ) from None


def check_benchmark(config: BenchmarkConfig, layouts: Sequence[str]) -> None:
    """All that can be known before the first model is loaded."""
    if unknown := sorted(set(layouts) - set(LAYOUTS)):
        raise UserError(f"--layouts {','.join(unknown)}: unknown", f"known: {', '.join(LAYOUTS)}")
    for field in dataclasses.fields(config):
        given = getattr(config, field.name) != field.default
        if config.part == "rewards" and field.name in OF_WHOLE_STEPS and given:
            flag_name = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag_name} does nothing with --part rewards", "leave it out, or take --part step")
    if config.size == "sdxl" and not torch.cuda.is_available():
        raise UserError(
            "--size sdxl needs a CUDA device", "give a small model as --pretrained-model with --size folder"
        )
    if (
        config.part == "rewards"
        and config.size == "folder"
        and not config.clip_reward_model
        and not config.hpsv2_reward_model
    ):
        raise UserError("--part rewards without a reward model", "give --clip-reward-model or --hpsv2-reward-model")
    for layout in layouts:
        settings_of(config, layout, False)
    Prompts(config.data_path_train)
    write(config, [])


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(BenchmarkConfig, "benchmark", arguments)
    layouts = config.layouts.split(",")
    check_benchmark(config, layouts)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if config.size == "sdxl":
            tower = str(random_vit_h_14(Path(folder), DTYPES[config.mixed_precision]))
            config = dataclasses.replace(config, clip_reward_model=tower, hpsv2_reward_model=tower)
        for row in step_rows(config, layouts) if config.part == "step" else reward_rows(config):
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(config, rows)
    return EXIT_DONE


def step_rows(config: BenchmarkConfig, layouts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for layout in layouts:
        for checkpointing in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # so that peak memory is its own
                yield fresh.submit(measure, config, layout, checkpointing).result()


def reward_rows(config: BenchmarkConfig) -> Iterator[dict[str, Any]]:
    from train_t2i import reward_stage

    return reward_stage.rows(config)
