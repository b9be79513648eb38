"""From settings to a run that is ready for the loop: cheap checks first, then models, then the checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train_t2i import __version__, build, log, monitor, redact, reward_terms
from train_t2i.checkpoint import RunFolder
from train_t2i.config import ArcFlowConfig, DMDRConfig, Settings, SFTConfig, listed
from train_t2i.engine import AdamSettings, Engine
from train_t2i.environment import environment, note_start
from train_t2i.errors import UserError
from train_t2i.feed import Feed, dataset_for
from train_t2i.image_data import Rows
from train_t2i.methods import METHODS
from train_t2i.networks import Networks, Role
from train_t2i.prompt_cache import CachedText, PromptCache
from train_t2i.rates import rate, steps_of
from train_t2i.resume import (
    check_grid,
    check_length,
    check_resumable,
    check_rows,
    find_checkpoint,
    kept_batch,
    owns,
    readings_of,
    restore,
    told_of_start,
)
from train_t2i.rows import Rejects
from train_t2i.run import Run, State, StopRequest
from train_t2i.sheet import SampleSheet, sheet_rows
from train_t2i.watchdog import Watchdog

LOW_RATE = 0.5  # of --trainable-modules-low-learning-rate
START: dict[str, Any] = {"step": 0, "manifest": {}}  # what a run without a checkpoint goes on from


def learning_rate(settings: Settings, role: Role, step: int, first_step: int = 0) -> float:
    """A pure function of the step, counted from the stage's first: see rates.py."""
    run = settings.run
    base = run.learning_rate_gen if role == "generator" else settings.method.learning_rate_gui
    return rate(
        base, step - first_step, run.max_train_steps - first_step, run.lr_scheduler, run.lr_warmup_steps,
        run.lr_num_cycles, run.lr_power,
    )  # fmt: skip


def with_length(settings: Settings, rows: int, global_batch: int, first_step: int) -> Settings:
    """``--num-train-epochs`` as the step that a stage ends at, now that its rows and processes are known."""
    run = settings.run
    if not run.num_train_epochs:
        return settings
    last = first_step + steps_of(run.num_train_epochs, rows, global_batch)
    return replace(settings, run=replace(run, max_train_steps=last))


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from: nothing, a checkpoint of its own, or another run's, which starts a stage."""

    path: Path | None
    record: dict[str, Any]
    continues: bool  # its own
    told: list[str]

    @property
    def first_step(self) -> int:
        """Of this stage."""
        return self.record["first_step"] if self.continues else self.record["step"]


def find_resumed(settings: Settings, folder: RunFolder, engine: Engine) -> Resumed:
    path = find_checkpoint(settings.run, folder)
    record, told = check_resumable(settings, path, folder) if path else (START, [])
    if not engine.same_everywhere(json.dumps([record["step"], record["manifest"]], sort_keys=True)):
        raise UserError(
            f"the processes do not find the same checkpoint in {folder.root}",
            "put --output-dir on a disk that all machines share",
        )
    return Resumed(path, record, path is not None and owns(folder, path), told)


def read_data(
    settings: Settings, folder: RunFolder, engine: Engine, resumed: Resumed
) -> tuple[Rows, tuple[int, int], Settings]:
    """(rows, (rows a process and micro-batch, micro-batches), the settings with the last step that rows and epochs make)."""
    cfg, record = settings.run, resumed.record
    rejects = Rejects(folder.root / "rejected.jsonl", cfg.max_bad_fraction, writes=engine.is_main)
    data = dataset_for(METHODS[cfg.method].data, settings, rejects)
    batch = cfg.batch_size, cfg.gradient_accumulation_steps
    if resumed.path and resumed.continues:
        check_rows(record, len(data), resumed.path)
        batch = kept_batch(cfg, record, engine.world)
    settings = with_length(settings, len(data), math.prod(batch) * engine.world, resumed.first_step)
    if resumed.path:
        check_length(settings, record, resumed.path, resumed.continues)
    return data, batch, settings


def with_memory(settings: Settings, engine: Engine) -> tuple[Settings, list[str]]:
    """(the settings with ``--gradient-checkpointing auto`` decided, alike on all processes; what to say of it)."""
    if settings.run.gradient_checkpointing != "auto":
        return settings, []
    from train_t2i.plan.automatic import choose, memory_of

    # the main process decides: the others may see a card of another size
    made = choose(settings, engine.backend_name, engine.world, memory_of(engine.device)) if engine.is_main else None
    on, told = engine.from_main(made or (True, ""))
    return replace(settings, run=replace(settings.run, gradient_checkpointing=on)), [told]


def prepare(settings: Settings, folder: RunFolder, engine: Engine, stop: StopRequest, watch: Watchdog) -> Run:
    """Cheap checks first, then models, then the checkpoint."""
    cfg, kind = settings.run, METHODS[settings.run.method]
    resumed = find_resumed(settings, folder, engine)
    check_trains(settings, resumed.record["step"])
    if resumed.continues and monitor.gamed(settings, readings := readings_of(resumed.record)):
        raise monitor.stop_of(settings, readings, folder)
    build.check_started(settings, engine.backend_name, engine.device)
    settings, chosen = with_memory(settings, engine)
    cfg = settings.run
    found = [*engine.told, *reward_terms.check(settings.method), *chosen]
    if cfg.offload_optimizer and engine.device.type == "cpu":
        found.append("--offload-optimizer: nothing to do on a CPU, whose memory is the host's")
    (build.check_initial if resumed.continues else build.check_start)(cfg)
    data, batch, settings = read_data(settings, folder, engine, resumed)
    asked = sheet_rows(settings, data)
    watched, reference = monitor.check(settings, len(asked[0]))
    found += watched
    if cfg.prompt_cache:
        PromptCache(cfg.prompt_cache).need([*asked[0], getattr(settings.method, "negative_prompt", "")])

    family = build.build_family(cfg, engine.dtype).to(engine.device)
    shape = build.latent_shape(family, settings.size_px)
    if resumed.path and not resumed.continues:
        check_grid(cfg, family, resumed.record, resumed.path)
    data.settle(shape, family.size_multiple, family.path.grid(cfg.sample_num_steps), family.max_side_px)
    found += [data.told] if data.told else []
    found += told_of_start(cfg, family)
    networks = build.assemble(
        settings, family, uses=kind.uses, trains=kind.trains, dtype=engine.dtype, place=engine.place,
        autocast=engine.autocast,
    )  # fmt: skip
    towers = engine.dtype, engine.device, "rewards" in cfg.recomputed
    terms = reward_terms.build_terms(settings.method, *towers, cfg.seed)
    features = reward_terms.build_features(settings.method, *towers)
    method = build.build_method(
        settings, networks, engine.device, terms, features=features, calls_need_all=engine.calls_need_all
    )
    found += [family.compared] if isinstance(family, CachedText) else []
    found.append(trained_parameters(networks))  # counted before they are shared out
    for role in kind.trains:
        networks.prepare(role, engine.prepare, adam_settings(settings, role))
    workers = cfg.num_workers if data.reads_images else 0
    feed = Feed(data, cfg.seed, *batch, engine.rank, engine.world, workers)
    quiet_log = log.RunLog(folder.root, method.columns, is_main=False)
    run = Run(
        settings, folder, engine, networks, method, feed, quiet_log, SampleSheet.none(), None, State(), stop, watch
    )
    if resumed.path:
        restore(run, resumed.path)
    # what comes after the checkpoint is written again; without one of its own, everything is
    first_tick = run.state.clock.tick + 1 if resumed.continues else 0
    if engine.is_main:
        log.cut_logs(folder.root, first_tick)
    run.log = make_log(run, first_tick)
    run.sheet = SampleSheet.build(settings, method, networks, folder.root, run.log, asked, engine)
    run.monitor = monitor.build_monitor(settings, run.sheet, terms, reference, engine.dtype)
    told = [*resumed.told, *(told_of_batch(resumed.record, engine, batch) if resumed.continues else [])]
    announce(run, resumed.path, [*found, *told, *advice(settings, resumed.path)])
    return run


def check_trains(settings: Settings, first_step: int) -> None:
    """Refuse a start at which the generator has no loss yet."""
    method = settings.method
    if isinstance(method, DMDRConfig) and method.dmd_weight == 0 and first_step < method.cold_start_iter:
        raise UserError(
            f"--dmd-weight 0: nothing to train at step {first_step}, rewards begin at {method.cold_start_iter}",
            f"set --cold-start-iter {first_step}",
        )


def trained_parameters(networks: Networks) -> str:
    counts = {role: sum(p.numel() for p in networks.parameters(role)) for role in networks.trains}
    return "trained parameters: " + ", ".join(f"{role} {count / 1e6:.2f} M" for role, count in counts.items())


def told_of_batch(record: dict[str, Any], engine: Engine, batch: tuple[int, int]) -> list[str]:
    if engine.world == record["world_size"]:
        return []
    rows, micro = batch
    return [
        f"made by {record['world_size']} processes, now {engine.world}: the global batch of {record['global_batch']} "
        f"is kept as {micro} micro-batches of {rows} rows a process"
    ]


def advice(settings: Settings, resume_from: Path | None) -> list[str]:
    run = settings.run
    starts_bare = resume_from is None and not run.xl_ode_pretrain_path and not run.generator_init
    told = []
    if run.method == "dmdr" and run.model_family == "sdxl" and run.sample_num_steps == 1 and starts_bare:
        told.append("warning: a one-step student without --xl-ode-pretrain-path starts far from the teacher")
    if isinstance(settings.method, DMDRConfig) and run.model_family == "flux" and settings.method.cfg_r > 1:
        told.append("warning: FLUX.1-dev has its guidance in --guidance-embed; --cfg-r above 1 guides it a second time")
    return told


def adam_settings(settings: Settings, role: Role) -> AdamSettings:
    run = settings.run
    decay = run.adam_weight_decay if role == "generator" else 0.0
    betas = (run.adam_beta1, run.adam_beta2)
    factors = rate_factors(settings.method)
    rate, offload = learning_rate(settings, role, 0), run.offload_optimizer
    return AdamSettings(rate, betas, run.adam_epsilon, decay, run.use_8bit_adam, factors, offload)


def rate_factors(method: Any) -> dict[str, float]:
    """Expression for the names of parameters -> what their learning rate is multiplied by."""
    if isinstance(method, ArcFlowConfig):
        return {r"\.log_momenta\.": method.momentum_rate}
    if isinstance(method, SFTConfig):
        return {re.escape(part): LOW_RATE for part in listed(method.trainable_modules_low_learning_rate)}
    return {}


def make_log(run: Run, first_tick: int) -> log.RunLog:
    cfg, root = run.settings.run, run.folder.root
    trackers: list[log.Tracker] = []
    public = public_settings(run.settings)
    if run.engine.is_main and "tensorboard" in cfg.report_to:
        trackers.append(log.Tensorboard(root, public, first_tick))
    if run.engine.is_main and "wandb" in cfg.report_to:
        trackers.append(log.Wandb(root, public, tracker_id(root)))
    return log.RunLog(
        root, run.method.columns, is_main=run.engine.is_main, mean=run.engine.mean, trackers=trackers,
        total_steps=cfg.max_train_steps, first_step=run.state.clock.step, tick=run.state.clock.tick, first_tick=first_tick,
        device=run.engine.device,
    )  # fmt: skip


def tracker_id(root: Path) -> str:
    """The run id at trackers: made once, kept beside them, so that a resumed run goes on in the same place."""
    file = root / "trackers" / "run_id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(os.urandom(4).hex())
    return file.read_text().strip()


def public_settings(settings: Settings) -> dict[str, Any]:
    """What args.json and trackers show."""
    shown = {**settings.as_dict(), "layout": build.resolved_layout(settings.run), "code_version": __version__}
    return redact.clean_values(shown)


def announce(run: Run, resume_from: Path | None, lines: Sequence[str]) -> None:
    root, networks = run.folder.root, run.networks
    if run.engine.is_main:
        text = json.dumps(public_settings(run.settings), indent=1, ensure_ascii=False)
        (root / "args.json").write_text(text + "\n", encoding="utf-8")
        engine = run.engine
        note_start(root, environment(engine.device, engine.world, engine.backend_name, run.state.clock.tick))
    shared = f", {run.engine.world} processes, {run.engine.backend_name}" if run.engine.world > 1 else ""
    run.log.say(f"{run.settings.run.method}, layout {networks.layout}{shared}")
    grid = networks.family.path.grid(run.settings.run.sample_num_steps)
    run.log.say(f"student's times: {', '.join(f'{t:.3f}' for t in grid[:-1].tolist())}; {len(run.feed.dataset)} rows")
    for line in lines:
        run.log.say(line)
    if resume_from is not None:
        run.log.say(f"going on from {resume_from} (step {run.state.clock.step})")
