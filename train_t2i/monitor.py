"""What is watched while rewards are followed: rewards that are in no loss, diversity, recall, read off fixed sample images.

Reading i of a run and reading j see the same prompts and the same noise, those of the sample sheet and of some more seeds.
Shapes: P prompts, S seeds of each; images (P, 3, H, W) in [0, 1]; features (P, D) of length one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rewards
from train_t2i import guard
from train_t2i.checkpoint import RunFolder
from train_t2i.config import DMDRConfig, Settings
from train_t2i.errors import EXIT_GAMED, UserError
from train_t2i.guard import Reading, Tolerance
from train_t2i.image_data import encoded
from train_t2i.methods import RewardTerm
from train_t2i.metrics import LEAST_ROWS, recall, spread
from train_t2i.reward_flags import monitor_paths
from train_t2i.reward_terms import build_reward, look_at
from train_t2i.rows import Row, load_rows
from train_t2i.sheet import SampleSheet

if TYPE_CHECKING:
    from rewards.tower import CosineReward
    from train_t2i.run import Run

MIN_PROMPTS = 2  # of which there is a mean and its error


# -- what is read ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monitor:
    """Scores images on the main process."""

    prompts: Sequence[str]
    terms: tuple[RewardTerm, ...]
    held_out: dict[str, rewards.Reward]
    tower: CosineReward  # whose features tell images apart
    reference: Tensor | None = None  # (M, D)

    @torch.no_grad()
    def read(self, step: int, drawn: Iterable[Tensor]) -> Reading:
        """A reading of P * S images; ``drawn``: P images of each of S seeds, seed by seed."""
        training: dict[str, list[Tensor]] = {}
        held_out: dict[str, list[Tensor]] = {}
        features = []
        for images in drawn:
            for term in self.terms:  # one of weight 0 is in no loss
                scores = term.score(images, term.prompts(self.prompts), tick=0)
                (training if term.weight > 0 else held_out).setdefault(f"reward_{term.name}", []).append(scores)
            for name, reward in self.held_out.items():
                held_out.setdefault(f"held_out_{name}", []).append(reward(images, self.prompts))
            features.append(self.tower.encode_images(images).float().cpu())
        covered = recall(torch.cat(features), self.reference) if self.reference is not None else None
        return Reading(step, numbers(training), numbers(held_out), listed(spread(torch.stack(features))), covered)


def numbers(scores: dict[str, list[Tensor]]) -> dict[str, guard.Scores]:
    return {name: listed(torch.cat(batches)) for name, batches in scores.items()}


def listed(values: Tensor) -> guard.Scores:
    return tuple(values.double().tolist())


# -- set up ----------------------------------------------------------------------------------------------------------


def check(settings: Settings, num_prompts: int) -> tuple[list[str], list[Row]]:
    """(lines that say what was found, the reference's rows) before anything loads.  Raises UserError."""
    method = settings.method
    if not isinstance(method, DMDRConfig) or not (paths := monitor_paths(method)):
        return [], []
    found = [f"monitor {name}: {look_at('--monitor-rewards', name, path)}" for name, path in paths.items()]
    first = next(iter(paths))
    if first not in rewards.TOWERS:
        raise UserError(
            f"--monitor-rewards {first}: has no features of images, by which the first says how diverse they are",
            f"put one of {', '.join(rewards.TOWERS)} first",
        )
    if settings.run.sample_steps and num_prompts < MIN_PROMPTS:
        raise UserError(
            f"--monitor-rewards: {num_prompts} sample prompts", f"give {MIN_PROMPTS} at least: --batch-size-test"
        )
    rows = load_rows(method.monitor_reference) if method.monitor_reference else []
    if method.monitor_reference and len(rows) < LEAST_ROWS:
        raise UserError(
            f"--monitor-reference {method.monitor_reference}: {len(rows)} rows", f"give {LEAST_ROWS} at least"
        )
    return found, rows


def build_monitor(
    settings: Settings, sheet: SampleSheet, terms: tuple[RewardTerm, ...], rows: Sequence[Row], dtype: torch.dtype
) -> Monitor | None:
    """None where nothing is watched, or another process scores what is drawn.  Raises UserError."""
    method = settings.method
    if not (sheet.draws and sheet.writes) or not isinstance(method, DMDRConfig) or not (paths := monitor_paths(method)):
        return None
    device = sheet.device
    held_out = {name: build_reward(name, path, dtype, device, False) for name, path in paths.items()}
    tower = next(iter(held_out.values()))
    reference = encoded(rows, settings.size_px, tower.encode_images) if rows else None
    return Monitor(sheet.prompts, terms, held_out, tower, reference)


# -- in the loop -----------------------------------------------------------------------------------------------------


def tolerance_of(method: DMDRConfig) -> Tolerance:
    return Tolerance(method.guard_reward_drop, method.guard_diversity_drop)


def judged(method: DMDRConfig, readings: Sequence[Reading]) -> list[Reading]:
    """Those that the guard judges: since rewards began, and without a score that is not a number."""
    return [reading for reading in readings if reading.step >= method.cold_start_iter and reading.finite]


def good_step(settings: Settings, readings: Sequence[Reading]) -> int | None:
    """The step of the last reading at which nothing had fallen; none where nobody watches."""
    method = settings.method
    if not isinstance(method, DMDRConfig) or method.reward_guard == "off":
        return None
    return guard.last_good(judged(method, readings), tolerance_of(method))


def gamed(settings: Settings, readings: Sequence[Reading]) -> str:
    """What was gamed at the last reading, in words; nothing unless ``--reward-guard stop`` ends the run for it."""
    method = settings.method
    if not isinstance(method, DMDRConfig) or method.reward_guard != "stop":
        return ""
    return told(guard.verdict(judged(method, readings), tolerance_of(method)))


def stop_of(settings: Settings, readings: Sequence[Reading], folder: RunFolder) -> UserError:
    """The end of a run whose rewards were ``gamed``, once all its checkpoints are on the disk."""
    good = good_step(settings, readings)
    saved = (folder.record(step) for step in folder.steps() if good is not None and step <= good)
    path = next((path for path in saved if not folder.damage(path)), settings.run.resume_ckpt)
    return UserError(
        f"reward guard: stopped at step {readings[-1].step} and saved: {gamed(settings, readings)}",
        f"last good checkpoint: {path}; start a new --exp-name from it with lower reward weights, or go on here with "
        "--auto-resume --reward-guard scale",
        EXIT_GAMED,
    )


def due(run: Run) -> bool:
    """A reading is taken at the multiples of ``--sample-steps``, where a stage begins, and where its rewards begin.

    Not at the last step: a run that goes on from there would have one more than an unbroken one.
    """
    cfg, method, state = run.settings.run, run.settings.method, run.state
    if not isinstance(method, DMDRConfig) or not method.monitor_rewards or not cfg.sample_steps:
        return False
    step = state.clock.step
    taken = bool(state.readings) and state.readings[-1].step == step  # before the checkpoint that was gone on from
    return not taken and (step % cfg.sample_steps == 0 or step in (state.first_step, method.cold_start_iter))


def read(run: Run, drawn: Iterable[Tensor]) -> Reading | None:
    """The main process's reading; the others draw along where calls need all."""
    if run.monitor:
        return run.monitor.read(run.state.clock.step, drawn)
    for _ in drawn:
        pass
    return None


def watch(run: Run, drawn: Tensor | None) -> bool:
    """Take a reading where one is due, log it, and warn or scale the rewards where ``--reward-guard`` says so.

    True where one was taken.  ``drawn``: the student's images of the sheet, where this step has it.
    """
    state, method = run.state, run.settings.method
    if not due(run):
        return False
    run.begin("sample")
    reading = run.engine.from_main(read(run, run.sheet.students(method.monitor_seeds, drawn)))
    assert reading is not None
    run.log.reading(state.clock.step, state.samples_seen, reading.means() | {"guard_scale": state.clock.reward_scale})
    state.readings.append(reading)
    if not reading.finite:
        run.log.say(f"warning: reward guard: step {reading.step}: not judged, a score is not a finite number")
        return True
    history, tolerance = judged(method, state.readings), tolerance_of(method)
    fresh = guard.crossed(history, tolerance)
    if method.reward_guard == "warn" and fresh.gamed:
        run.log.say(f"warning: reward guard: step {reading.step}: {told(fresh)}")
    if method.reward_guard == "scale" and (fresh.gamed or guard.worsens(history, tolerance)):
        state.scale_rewards(method.guard_factor)
        why = told(guard.verdict(history, tolerance))
        run.log.say(f"reward guard: step {reading.step}: rewards now count {state.clock.reward_scale:.4g}: {why}")
    return True


def told(found: guard.Verdict) -> str:
    """A game in words; nothing where there is none."""
    if not found.gamed:
        return ""
    return f"rose: {', '.join(map(str, found.risen))}; fell: {', '.join(map(str, found.fallen))}"
