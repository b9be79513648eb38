"""What a run's checkpoint holds, and going on from one: the same run bit for bit, or a new stage from another run's."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from train_t2i import __version__, build, monitor
from train_t2i.adapters import export_adapter
from train_t2i.checkpoint import Part, RunFolder, run_of
from train_t2i.config import Config, Settings, fields_of, resolved_layout
from train_t2i.engine import RoleState
from train_t2i.errors import UserError
from train_t2i.families import Family
from train_t2i.guard import Reading
from train_t2i.initial_weights import record_of_start
from train_t2i.methods import METHODS
from train_t2i.methods.base import Clock
from train_t2i.networks import Role
from train_t2i.rates import DECAYS
from train_t2i.run import Run, State

STAGE_FIELDS = ("model_family", "use_lora_gen", "lora_rank", "lora_targets", "layout", "sample_num_steps")
GRID_TOLERANCE = 1e-6
BATCH_FIELDS = ("batch_size", "gradient_accumulation_steps")
SHEET_FIELDS = ("batch_size_test", "sample_prompts")  # what readings of one run have in common
INIT_FIELDS = ("generator_init", "xl_ode_pretrain_path")  # frozen under a LoRA, so not in its checkpoints
EXPORTS: dict[Role, str] = {"generator": "lora_gen", "guidance": "lora_gui"}


def save(run: Run) -> None:
    """Take a copy of the state, and have the main process write it beside the loop and prune old checkpoints.

    Raises the error of the save before, if it failed.
    """
    run.saver.wait()  # one copy at a time
    parts, record = checkpoint_parts(run), checkpoint_record(run)
    step, keep = run.state.clock.step, run.settings.run.checkpoints_total_limit or None
    good = monitor.good_step(run.settings, run.state.readings)

    def write() -> None:
        run.folder.save(step, parts, record)
        run.folder.prune(keep, good)

    if run.engine.is_main:
        run.saver.start(write)
    run.saved_at = time.monotonic()


def checkpoint_parts(run: Run) -> dict[str, Part]:
    """What is saved, in memory that training does not touch; empty but for the main process.  All processes call it."""
    states = {role: run.engine.role_state(role) for role in run.method.trains}
    parts = {}
    specs = build.adapter_specs(run.settings.run, run.networks.family)
    for role, state in states.items() if run.engine.is_main else ():
        tensors = {"model": state.model, "optimizer": state.optimizer}
        if state.average:
            tensors["ema"] = state.average
        parts[build.ROLE_FOLDERS[role]] = Part(tensors, {"optimizer": state.values, "scaler": state.scaler})
        if run.networks.routes[role][1] is not None:
            files, config = export_adapter(
                run.networks.family, str(run.networks.routes[role][1]), specs[role], state.average or state.model
            )
            parts[EXPORTS[role]] = Part(files, {"adapter_config": config})
    return parts


def checkpoint_record(run: Run) -> dict[str, Any]:
    state = run.state
    return {
        "tick": state.clock.tick,
        "samples_seen": state.samples_seen,
        "first_step": state.first_step,
        "skipped_by_role": state.skipped_in_a_row,
        "readings": [asdict(reading) for reading in state.readings],
        "reward_scale": state.clock.reward_scale,
        "world_size": run.engine.world,
        "global_batch": run.feed.global_batch,
        "rows": len(run.feed.dataset),
        "backend": run.engine.backend_name,
        "settings": run.settings.as_dict(),
        "grid": run.networks.family.path.grid(run.settings.run.sample_num_steps).tolist(),
        "shift": run.networks.family.path.shift,
        "code_version": __version__,
    }


def find_checkpoint(cfg: Config, folder: RunFolder) -> Path | None:
    """The record to go on from.  With ``--auto-resume`` the run's own newest wins over another run's path.

    A folder that holds a run is gone on with or left alone: no other run writes over it.
    """
    own = folder.latest() if cfg.auto_resume or cfg.resume_ckpt == "latest" else None
    if own is not None:
        return own
    if cfg.resume_ckpt == "latest" and not cfg.auto_resume:
        raise UserError(f"--resume-ckpt latest: no complete checkpoint in {folder.root}", "leave it out to start anew")
    path = None if cfg.resume_ckpt in (None, "latest") else Path(str(cfg.resume_ckpt))
    if path is not None and not path.is_file():
        raise UserError(
            f"--resume-ckpt {path}: no such file",
            "run the stage that makes it, or give a run's checkpoints/torch_units/step-N.pt, or latest",
        )
    if folder.steps() and (path is None or not owns(folder, path)):
        if cfg.auto_resume:
            raise UserError(f"{folder.root}: no checkpoint of this run is intact", "choose another --exp-name")
        raise UserError(f"{folder.root} already holds a run", "go on with --auto-resume, or choose another --exp-name")
    return path


def check_resumable(settings: Settings, path: Path, folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """(record, lines about settings that differ).  Raises UserError where they must not; reads no weights."""
    _, record = run_of(path).load(path, [])
    now, then = settings.as_dict(), dict(record["settings"])
    if missing := [role for role in METHODS[settings.run.method].trains if not _has_part(record, role)]:
        raise UserError(
            f"--resume-ckpt {path}: made by --method {then['method']}, it has no {missing[0]} network to go on with",
            "start the generator from it instead: --xl-ode-pretrain-path (one step) or --generator-init",
        )
    then["layout"] = resolved_layout(Settings.from_dict(then).run)
    then["model_family"] = now["model_family"] if then["model_family"] == "auto" else then["model_family"]
    fields = fields_of(settings.run.method)
    changed = [name for name in fields if name in then and then[name] != now[name]]
    if settings.run.num_train_epochs and "max_train_steps" in changed:
        changed.remove("max_train_steps")  # not known yet: check_length
    told = {name: f"{name}: checkpoint={then[name]!r} now={now[name]!r}" for name in changed}
    if owns(folder, path):
        fatal = [name for name in changed if fields[name].metadata["resume"] == "fatal"]
        fix = "set them back, or start a new --exp-name from this checkpoint"
        fatal += [name for name in changed if name in SHEET_FIELDS and now.get("monitor_rewards")]
        told = {name: told[name] for name in told if name in fatal or fields[name].metadata["resume"] != "free"}
        fatal = [name for name in fatal if name not in BATCH_FIELDS]  # checked as a whole: global_batch_kept
    else:
        fatal = [name for name in changed if name in _stage_fields(settings.run, then)]
        fix = "these must match"
    if fatal:
        raise UserError(f"--resume-ckpt {path}: settings differ: {'; '.join(told[name] for name in fatal)}", fix)
    return record, list(told.values())


def check_length(settings: Settings, record: dict[str, Any], path: Path, continues: bool) -> None:
    """Refuse another last step where the rates depend on it, and a stage that would have no step.

    Apart from ``check_resumable`` since ``--num-train-epochs`` are steps only when the data is known.
    """
    run, then = settings.run, record["settings"]["max_train_steps"]
    if continues and run.max_train_steps != then and run.lr_scheduler in DECAYS:
        raise UserError(
            f"--resume-ckpt {path}: settings differ: max_train_steps: checkpoint={then} now={run.max_train_steps}, "
            f"and --lr-scheduler {run.lr_scheduler} depends on it",
            "set it back, or start a new --exp-name from this checkpoint",
        )
    if not continues and record["step"] >= run.max_train_steps:
        raise UserError(
            f"--max-train-steps {run.max_train_steps}: {path} has them already",
            f"set it above {record['step']}: steps are counted through the stages",
        )


def check_rows(record: dict[str, Any], rows: int, path: Path) -> None:
    """Refuse to continue a run on data of another length, from which another order of samples follows.

    Records of older versions do not tell theirs.
    """
    then = record.get("rows", rows)
    if then != rows:
        raise UserError(
            f"--resume-ckpt {path}: its data had {then} rows, now {rows}, which changes the order of the samples",
            "give the --data-path-train and --prompt-cache it had, or start a new --exp-name from this checkpoint",
        )


def kept_batch(cfg: Config, record: dict[str, Any], world: int) -> tuple[int, int]:
    """(rows a process and micro-batch, micro-batches) with which this many processes go on with a run's global batch.

    No process gets larger micro-batches than the flags say: it accumulates more of them instead.  Raises UserError.
    """
    rows, then = record["global_batch"], record["settings"]
    if cfg.batch_size * cfg.gradient_accumulation_steps * world == rows:
        return cfg.batch_size, cfg.gradient_accumulation_steps
    if changed := [name for name in BATCH_FIELDS if getattr(cfg, name) != then[name]]:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise UserError(
            f"{flags}: {world} processes would make batches of {cfg.batch_size * cfg.gradient_accumulation_steps * world}"
            f" rows, this run's have {rows}",
            "set them back, or start a new --exp-name from this checkpoint",
        )
    if rows % world:
        counts = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = [n for n in counts if n < world][-1:] + [n for n in counts if n > world][:1]
        raise UserError(
            f"this run's global batch of {rows} rows does not divide among {world} processes",
            f"launch {' or '.join(map(str, nearest))}, the nearest that divide it",
        )
    own = rows // world
    micro = max(n for n in range(1, own + 1) if own % n == 0 and n <= cfg.batch_size)
    return micro, own // micro


def owns(folder: RunFolder, path: Path) -> bool:
    """Whether a checkpoint is this run's own: then the run is continued, else a stage starts from it."""
    return run_of(path).root.resolve() == folder.root.resolve()


def _stage_fields(run: Config, then: dict[str, Any]) -> tuple[str, ...]:
    """What a stage shares with the run it starts from.  A shift of 0 is the model's own at the run's size: see check_grid.

    Supervised training's is of its times, not of a student's grid.
    """
    free = run.method == "sft" or 0 in (run.shift, then.get("shift"))
    shift = () if free else ("shift",)
    return (*STAGE_FIELDS, *shift, *(INIT_FIELDS if run.layout == "paired_lora" else ()))


def check_grid(cfg: Config, family: Family, record: dict[str, Any], path: Path) -> None:
    """Raises UserError where a stage's student would be asked for other times than those that it was trained on."""
    if differ := _other_times(cfg, family, record):
        raise UserError(
            f"--resume-ckpt {path}: its student was trained on the times {differ[0]}, this stage's are {differ[1]}",
            f"set --shift {record.get('shift', 'as it was')}, or --resolution and --sample-num-steps as they were",
        )


def told_of_start(cfg: Config, family: Family) -> list[str]:
    """A warning where the generator starts from a run's student (its export or its step-N.pt) of other times.

    None for weights of supervised training, which have no times of their own, nor where the record cannot be read.
    """
    given = cfg.generator_init or cfg.xl_ode_pretrain_path
    record = record_of_start(given) if given else None
    differ = _other_times(cfg, family, record) if record and record["settings"]["method"] != "sft" else None
    said = "warning: {} was trained on the times {}, this run's are {}: set --shift and --sample-num-steps as they were there"
    return [said.format(given, *differ)] if differ else []


def _other_times(cfg: Config, family: Family, record: dict[str, Any]) -> tuple[str, str] | None:
    """(the times of the record's student, those of this run's) where they differ."""
    then, now = torch.tensor(record["grid"]), family.path.grid(cfg.sample_num_steps)
    if then.shape == now.shape and torch.allclose(then, now, rtol=0, atol=GRID_TOLERANCE):
        return None
    past, present = (", ".join(f"{t:.4f}" for t in grid[:-1].tolist()) for grid in (then, now))
    return past, present


def readings_of(record: dict[str, Any]) -> list[Reading]:
    """What was watched up to a checkpoint; those of older versions have nothing."""
    return [Reading(**reading) for reading in record.get("readings", ())]


def _has_part(record: dict[str, Any], role: Role) -> bool:
    return any(name.startswith(f"{build.ROLE_FOLDERS[role]}/") for name in record["manifest"])


def restore(run: Run, path: Path) -> None:
    """Weights, optimizers and counters from a checkpoint.  Learning rates come from the settings."""
    continues = owns(run.folder, path)
    parts, record = run_of(path).load(path, [build.ROLE_FOLDERS[role] for role in run.method.trains])
    for role in run.method.trains:
        part = parts[build.ROLE_FOLDERS[role]]
        saved = RoleState(
            dict(part.tensors["model"]),
            dict(part.tensors["optimizer"]),
            part.values["optimizer"],
            part.values["scaler"],
            dict(part.tensors.get("ema", {})),
        )
        if not run.engine.fits(role, saved):
            raise UserError(
                f"--resume-ckpt {path}: its weights are of another model or rank", "use the same model and ranks"
            )
        run.engine.load_role(role, saved)
    skipped = dict(record["skipped_by_role"]) if continues else {}
    first_step = record["first_step"] if continues else record["step"]
    batch = run.feed.global_batch  # of a stage its own; it starts at a whole one
    samples = -(-record["samples_seen"] // batch) * batch
    scale = record.get("reward_scale", 1.0) if continues else 1.0
    readings = readings_of(record) if continues else []
    run.state = State(Clock(record["tick"], record["step"], reward_scale=scale), samples, first_step, skipped, readings)
