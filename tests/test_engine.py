"""The engine alone, and the learning rates that the loop gives it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import forked
import pytest
import tiny
import torch
from tiny_runs import record, stopped_at, weights

from train_t2i import build
from train_t2i.config import Config, DMDRConfig, Settings
from train_t2i.engine import AdamSettings, Engine, Flags
from train_t2i.engine.adam import LossScale
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.prepare import learning_rate

# -- learning rates --------------------------------------------------------------------------------------------------


def test_rates_are_a_function_of_the_step():
    def rates(steps, **run):
        settings = Settings(Config(learning_rate_gen=1.0, **run), DMDRConfig(learning_rate_gui=0.5))
        generator = [learning_rate(settings, "generator", step) for step in steps]
        guidance = [learning_rate(settings, "guidance", step) for step in steps]
        assert guidance == [pytest.approx(rate / 2) for rate in generator]
        return generator

    assert rates([0, 5, 99]) == [1, 1, 1]
    assert rates([0, 1, 3, 4], lr_warmup_steps=4) == [0.25, 0.5, 1, 1]
    cosine = rates([0, 5, 10, 11], lr_scheduler="cosine", max_train_steps=10)
    assert cosine == [1, pytest.approx(0.5), 0, 0]
    both = rates([0, 2, 6, 10], lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=10)
    assert both == [0.5, 1, pytest.approx(0.5), 0]
    settings = Settings(Config(learning_rate_gen=1.0, lr_scheduler="cosine", max_train_steps=30), DMDRConfig())
    assert [learning_rate(settings, "generator", step, 20) for step in (20, 25, 30)] == [1, pytest.approx(0.5), 0]


def test_the_rate_of_the_step_is_used_and_logged(trainer):
    run = trainer.run("run", "--lr-warmup-steps 4 --max-train-steps 3 --ratio-update 2")
    assert [line["lr"] for line in tiny.log_lines(run)] == [2.5e-4, 5e-4, 7.5e-4]
    assert [line["lr"] for line in tiny.log_lines(run, "guidance")] == [2.5e-4, 2.5e-4, 5e-4, 5e-4, 7.5e-4, 7.5e-4]


def test_a_stage_warms_up_from_its_own_first_step_also_when_it_is_continued(trainer, first):
    flags = f"--batch-size 1 --lr-warmup-steps 4 --resume-ckpt {record(first, 2)} --auto-resume"
    stage = trainer.run("stage", f"{flags} --max-train-steps 4")
    trainer.run("stage", f"{flags} --max-train-steps 5")
    assert [line["lr"] for line in tiny.log_lines(stage)] == [2.5e-4, 5e-4, 7.5e-4]


# -- the engine ------------------------------------------------------------------------------------------------------


def engine_of(precision: str = "no", max_grad_norm: float = 1.0, **adam):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    engine = Engine(Flags(precision, max_grad_norm))
    settings = AdamSettings(0.1, (0.9, 0.999), 1e-8, 0.0, False)
    engine.prepare("generator", torch.nn.Module(), {"p": parameter}, settings)
    return engine, parameter


@pytest.mark.parametrize(("limit", "expected"), [(1.0, (0.6, 0.8)), (0.0, (3.0, 4.0)), (9.0, (3.0, 4.0))])
def test_gradients_are_clipped_to_the_norm_that_was_set(monkeypatch, limit, expected):
    """The published flag did nothing."""
    engine, parameter = engine_of(max_grad_norm=limit)
    seen = []
    monkeypatch.setattr(engine.backend.optimizers["generator"], "step", lambda: seen.append(parameter.grad.tolist()))
    engine.backward("generator", (torch.tensor([3.0, 4.0]) * parameter).sum())
    report = engine.step("generator")
    assert float(report.grad_norm) == pytest.approx(5)
    assert seen == [pytest.approx(expected, rel=1e-4)]
    assert parameter.grad is None


def test_fp16_loss_scale_falls_once_an_overflow_and_survives_a_checkpoint():
    engine, parameter = engine_of("fp16")
    for scale, finite in ((65536.0, True), (65536.0, False), (32768.0, False), (16384.0, True)):
        assert engine.scales["generator"].scale == scale
        before = parameter.detach().clone()
        engine.backward("generator", parameter.sum() * (1.0 if finite else float("inf")))
        report = engine.step("generator")
        assert bool(report.skipped) is not finite
        assert torch.equal(parameter, before) is not finite
        assert not finite or float(report.grad_norm) == pytest.approx(2**0.5, rel=1e-3)
    saved = engine.role_state("generator")
    assert saved.scaler["_growth_tracker"] == 1  # counted anew after the overflow
    other, _ = engine_of("fp16")
    other.load_role("generator", replace(saved, scaler=json.loads(json.dumps(saved.scaler))))
    assert other.scales["generator"].scale == 16384.0
    other.load_role("generator", replace(saved, scaler={}))  # a stage whose checkpoint was not made in fp16
    assert other.scales["generator"].scale == 16384.0


def test_the_loss_scale_follows_torchs_own():
    """Doubled after a number of good steps, halved by an overflow: GradScaler on the same votes."""
    theirs, mine = torch.amp.GradScaler("cpu", growth_interval=3), LossScale.of(torch.float16)
    mine.growth_interval = 3
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0)
    for overflow in (False, False, False, False, True, False, False, False, True, True):
        optimizer.zero_grad()
        theirs.scale(parameter * (float("inf") if overflow else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        mine.update(overflow)
        assert mine.scale == theirs.get_scale()
        assert {key: mine.state()[key] for key in theirs.state_dict()} == theirs.state_dict()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(trainer, precision):
    flags = f"--mixed-precision {precision} --batch-size 1 --checkpoint-steps 1"
    whole = trainer.run("whole", flags)
    lines = tiny.log_lines(whole)
    assert all(line["skipped"] == 0 and line["loss"] > 0 for line in lines)
    assert {value.dtype for value in weights(whole, 2).values()} == {torch.float32}
    stopped_at(whole, 1, "again")
    tiny.assert_same_checkpoint(whole, trainer.run("again", f"{flags} --resume-ckpt latest"), 2)


def test_a_launch_that_starts_too_few_processes_is_refused(monkeypatch):
    """accelerate launch --cpu --num_processes 2 starts one and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    Engine(Flags())
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="starts one"):
        Engine(Flags())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes but 1"):
        Engine(Flags())


def test_quantised_weights_are_refused_on_the_backend_of_the_launchers_config(trainer, one_thread_before_a_fork):
    """Which is known once the processes have met: in two of them, before anything loads."""

    def launched(rank: int) -> None:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        build.build_family = None  # nothing may load

    arguments = trainer.arguments("run", "--use-lora-gen --base-quant int8 --backend auto")
    for child in forked.train_world(arguments, trainer.root / "out", before=launched):
        assert child.ends(60) == EXIT_USER, child.said()
        assert "--base-quant int8 does not go with --backend fsdp2" in child.said()


def test_eight_bit_adam_names_what_it_needs(trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if the extra were not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    ended = trainer.ends("run", "--use-8bit-adam", "direct")
    assert ended.code == EXIT_USER
    assert "--use-8bit-adam needs bitsandbytes" in ended.err
