"""Learning rates against diffusers' schedules, and how long so many epochs are."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny_runs import record

from train_t2i.cli import parse
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.prepare import learning_rate, with_length
from train_t2i.rates import DECAYS, LOWEST, SCHEDULERS, steps_of

BASE, EPOCHS, ROWS, WARMUP = 0.125, 3, 100, 4


def stock(name: str, total: int, warmup: int, cycles: int, power: float):
    """diffusers' factor of a step."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    made = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=cycles, power=power
    )
    return made.lr_lambdas[0]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_diffusers_whatever_the_processes(name: str, world: int, accumulate: int) -> None:
    """The course is that of the run's own updates: it is neither longer on several processes nor over before the end."""
    cycles, power = (3 if name == "cosine_with_restarts" else 1), (2.0 if name == "polynomial" else 1.0)
    warmup = 0 if name == "constant" else WARMUP  # diffusers' ``constant`` has none
    given = parse(
        f"--method sft --learning-rate-gen {BASE} --lr-scheduler {name} --lr-warmup-steps {warmup} --lr-num-cycles {cycles} "
        f"--lr-power {power} --batch-size 1 --gradient-accumulation-steps {accumulate} --num-train-epochs {EPOCHS}".split()
    )
    settings = with_length(given, ROWS, accumulate * world, 0)
    total = settings.run.max_train_steps
    assert total == EPOCHS * math.ceil(ROWS / (accumulate * world))
    factor = stock(name, total, warmup, cycles, power)
    for step in range(total + 1):
        expected = factor(step + 1 if step < warmup else step)  # no first update that moves nothing
        assert learning_rate(settings, "generator", step) == pytest.approx(BASE * expected, rel=1e-12), step
    end = learning_rate(settings, "generator", total)
    assert end == pytest.approx({"polynomial": LOWEST}.get(name, 0.0 if name in DECAYS else BASE), abs=1e-12)


def test_a_stage_has_its_own_course() -> None:
    given = parse(
        ["--method", "sft", "--lr-scheduler", "linear", "--learning-rate-gen", "1", "--num-train-epochs", "2"]
    )
    settings = with_length(given, 20, 4, first_step=7)
    assert settings.run.max_train_steps == 17
    assert [learning_rate(settings, "generator", step, 7) for step in (7, 12, 17)] == [1, 0.5, 0]


@pytest.mark.parametrize(("rows", "batch", "steps"), [(8, 4, 6), (9, 4, 9), (1, 8, 3)])
def test_a_last_batch_that_is_not_full_is_a_step(rows: int, batch: int, steps: int) -> None:
    assert steps_of(3, rows, batch) == steps


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--method sft --lr-num-cycles 2", "--lr-num-cycles does nothing"),
        ("--method sft --lr-power 2 --lr-scheduler linear", "--lr-power does nothing"),
        ("--num-train-epochs 2", "--num-train-epochs does nothing with prompts"),
        ("--method sft --num-train-epochs 2 --max-train-steps 5", "give one"),
        ("--method sft --lr-scheduler polynomial --learning-rate-gen 1e-7", "--learning-rate-gen 1e-07"),
        ("--lr-scheduler polynomial --learning-rate-gen 1e-5 --learning-rate-gui 1e-8", "--learning-rate-gui 1e-08"),
        ("--method sft --lr-scheduler piecewise_constant", "piecewise_constant"),
    ],
)
def test_what_has_no_sense_is_refused(flags: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(flags.split())
    assert named in str(caught.value)


FLAGS = "--batch-size 2 --lr-scheduler linear --checkpoint-steps 0"  # 6 rows: 3 steps an epoch


def test_epochs_end_a_run_and_a_longer_one_is_another_course(trainer) -> None:
    arguments = trainer.arguments("run", f"{FLAGS} --num-train-epochs 2", "sft")
    at = arguments.index("--max-train-steps")
    del arguments[at : at + 2]
    from train_t2i.__main__ import main

    assert main(arguments) == 0
    run = trainer.root / "run"
    assert [line["lr"] for line in tiny.log_lines(run)] == pytest.approx([1e-3 * (1 - i / 6) for i in range(6)])
    assert record(run, 6).exists()
    assert main([*arguments, "--auto-resume"]) == 0  # nothing more to do
    longer = [*arguments, "--auto-resume", "--num-train-epochs", "3"]
    trainer.say()
    assert main(longer) == EXIT_USER
    assert "max_train_steps: checkpoint=6 now=9" in trainer.say()[1]
    stage = [*arguments, "--exp-name", "stage", "--resume-ckpt", str(record(run, 6)), "--num-train-epochs", "1"]
    assert main(stage) == 0
    assert [line["step"] for line in tiny.log_lines(trainer.root / "stage")] == [7, 8, 9]
