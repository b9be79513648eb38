"""``python -m train_t2i train``: the program and the loop.  What they stand on is built in prepare.py."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rewards import RewardError
from train_t2i import build, cli, monitor, peers
from train_t2i.checkpoint import RunFolder
from train_t2i.config import Settings
from train_t2i.engine import Engine, Flags
from train_t2i.errors import EXIT_DISK, EXIT_DONE, EXIT_NON_FINITE, EXIT_PREEMPTED, UserError
from train_t2i.prepare import learning_rate, prepare
from train_t2i.resume import save
from train_t2i.run import Run, StopRequest
from train_t2i.storage import FULL
from train_t2i.watchdog import Watchdog, longest_wait_s

# ==== the loop ======================================================================================================


def loop(run: Run) -> int:
    """Train to ``max_train_steps``; returns the exit code."""
    cfg, engine, method, state = run.settings.run, run.engine, run.method, run.state
    ticks = run.feed.ticks(state.samples_seen)
    monitor.watch(run, draw_sheet(run))
    while state.clock.step < cfg.max_train_steps:
        run.begin("tick")
        engine.seed(cfg.seed, state.clock.tick)
        rollouts = [method.rollout(batch, state.clock) for batch in next(ticks)]
        roles = method.roles_at(state.clock)
        for role in roles:
            rate = learning_rate(run.settings, role, state.clock.step, state.first_step)
            engine.set_lr(role, rate)
            with run.networks.updating(role):
                for i, rollout in enumerate(rollouts):
                    for j, (loss, metrics) in enumerate(method.losses(role, rollout, state.clock)):
                        last = i == len(rollouts) - 1 and j == method.parts - 1
                        engine.backward(role, loss / len(rollouts), last=last)
                        run.log.add(role, metrics)
            report = engine.step(role)
            if role == "generator" and (decay := method.ema_decay(state.clock.step)) is not None:
                engine.average(role, decay)
            run.log.add(role, {"grad_norm": report.grad_norm, "lr": rate, "skipped": report.skipped})
        stepped = "generator" in roles
        state.advance(stepped, run.feed.global_batch)
        run.log.end_tick(state.clock.tick, state.clock.step, state.samples_seen)
        if stepped and after_step(run):
            return EXIT_PREEMPTED
    if engine.is_main:  # an earlier start may have been killed in its last prune
        run.folder.prune(cfg.checkpoints_total_limit or None, monitor.good_step(run.settings, state.readings))
    return EXIT_DONE


def draw_sheet(run: Run) -> Tensor | None:
    """The sample images of where the run stands, of the generator's moving average where it has one."""
    run.begin("sample")
    with run.engine.averaged("generator"):
        return run.sheet.draw(run.state.clock.step)


def after_step(run: Run) -> bool:
    """Sample, watch and save what is due at a step boundary; True if the run was asked to stop (and has saved).

    Raises UserError (EXIT_GAMED) where the guard ends the run, after it has saved.
    """
    cfg, step = run.settings.run, run.state.clock.step
    last = step >= cfg.max_train_steps
    draws = cfg.sample_steps > 0 and (step % cfg.sample_steps == 0 or last)
    if step % cfg.logging_steps == 0 or draws or last or monitor.due(run):
        write_log(run)
    drawn = draw_sheet(run) if draws else None
    watched = monitor.watch(run, drawn)
    gamed = watched and bool(monitor.gamed(run.settings, run.state.readings))
    minutes = (time.monotonic() - run.saved_at) / 60
    due = cfg.checkpoint_minutes > 0 and minutes >= cfg.checkpoint_minutes
    stopping, on_time, failed = run.engine.any_process(run.stop.asked, due, run.saver.failed)
    if failed:
        finish_save(run)
    if gamed or stopping or last or on_time or (cfg.checkpoint_steps and step % cfg.checkpoint_steps == 0):
        run.begin("save")
        write_log(run)  # a run that goes on from here writes the lines that come after it
        save(run)
    if gamed or stopping or last:
        finish_save(run)
    if gamed:
        raise monitor.stop_of(run.settings, run.state.readings, run.folder)
    if stopping and not last:
        run.log.say(f"stopped by a signal after step {step}; saved; go on with --auto-resume")
    return stopping and not last


def finish_save(run: Run) -> None:
    """Wait until the checkpoint is on the disk.  Raises UserError on all processes where the main one could not write it."""
    failure: Exception | None = None
    try:
        run.saver.wait()
    except Exception as error:
        failure = error
    failed = run.engine.any_process(failure is not None)[0]
    if failure is not None:
        raise failure
    if failed:
        raise UserError("the main process could not save", "see its message", EXIT_DISK)


def write_log(run: Run) -> None:
    """Write the lines of the ticks since the last time.  Raises UserError after too many non-finite updates in a row."""
    for role, line in run.log.write():
        count_skipped(run, role, line["tick"], line["skipped"] > 0)


def count_skipped(run: Run, role: str, tick: int, skipped: bool) -> None:
    """Stop after too many non-finite updates of a role in a row."""
    state, limit = run.state, run.settings.run.max_skipped
    count = state.skipped_in_a_row[role] = state.skipped_in_a_row.get(role, 0) + 1 if skipped else 0
    if not skipped:
        return
    run.log.say(f"tick {tick}: non-finite loss or gradient, {role} update skipped ({count} in a row)")
    if count >= limit:
        run.saver.wait()
        good = run.folder.latest()
        raise UserError(
            f"{limit} non-finite {role} updates in a row, stopped at step {state.clock.step}",
            f"last good checkpoint: {good}" if good else "no checkpoint was saved; lower the learning rates",
            EXIT_NON_FINITE,
        )


# ==== the program ===================================================================================================


def main(arguments: Sequence[str]) -> int:
    if cli.rehearse(arguments):
        return EXIT_DONE
    settings = build.resolved(cli.parse(arguments))
    folder = RunFolder(Path(settings.run.output_dir) / settings.run.exp_name)
    cfg = settings.run
    rank = int(os.environ.get("RANK", "0"))  # the meeting of the processes is watched already
    watch = Watchdog(folder.root, cfg.hang_seconds, rank)
    with peers.told_when_lost(), StopRequest() as stop, watch:
        flags = Flags(cfg.mixed_precision, cfg.max_grad_norm, cfg.batch_size, cfg.gradient_accumulation_steps)
        engine = Engine(flags, cfg.backend, longest_wait_s(cfg.hang_seconds))
        watch.met()
        with folder.lock() if engine.is_main else contextlib.nullcontext():
            return train(settings, folder, engine, stop, watch)


def train(settings: Settings, folder: RunFolder, engine: Engine, stop: StopRequest, watch: Watchdog) -> int:
    """Run under the lock.  ``.exit_code`` says how it ended, since launchers wrap codes; none: killed, or still running."""
    marker = folder.root / ".exit_code"
    code = -1  # an error that is nobody's mistake
    try:
        if engine.is_main:
            marker.unlink(missing_ok=True)
            folder.clean()
        with peers.told_when_lost():  # here for the marker, and outside for what comes later
            code = prepare_and_loop(settings, folder, engine, stop, watch)
    except UserError as error:
        code = error.exit_code
        raise
    finally:
        if engine.is_main and not watch.fired:
            with contextlib.suppress(OSError):  # the disk may be full
                marker.write_text(f"{code}\n")
        engine.close()
    return code


def prepare_and_loop(settings: Settings, folder: RunFolder, engine: Engine, stop: StopRequest, watch: Watchdog) -> int:
    try:
        run = prepare(settings, folder, engine, stop, watch)
        try:
            return loop(run)
        finally:
            run.saver.close()
            run.log.close()
    except RewardError as error:  # of a function of the user's own, called in the middle of a step
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"cannot write to {folder.root}: {error.strerror}",
            "make room, then run the same command with --auto-resume",
            EXIT_DISK,
        ) from error
