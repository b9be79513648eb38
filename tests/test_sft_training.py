"""What supervised training trains and keeps: named modules, half rates, an average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file
from tiny_runs import weights

from train_t2i.student import load_student

RATE = 1e-3


def saved(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "accelerator_1" / f"step-{step}" / f"{name}.safetensors")


def test_only_named_modules_are_trained_and_some_at_half_the_rate(trainer: Any, sdxl_folder: Path) -> None:
    """AdamW's first step moves every element by the rate, whatever its gradient; the rest is the base model's, also for
    those who load the student."""
    flags = f"--trainable-modules attn1,time_embedding --trainable-modules-low-learning-rate conv_in --learning-rate-gen {RATE}"
    run = trainer.run("run", f"{flags} --max-train-steps 1 --adam-weight-decay 0 --adam-epsilon 1e-12", "sft")
    kept = weights(run, 1)
    assert all(any(part in key for part in ("attn1", "time_embedding", "conv_in")) for key in kept)
    student = load_student(str(run)).network.state_dict()
    before = load_file(sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert student.keys() == before.keys()
    for key, value in before.items():
        moved = float((student[key] - value).abs().max())
        rate = RATE if "attn1" in key or "time_embedding" in key else RATE / 2 if "conv_in" in key else 0.0
        assert moved <= rate * 1.01, key
        if key.endswith("weight"):
            assert moved >= rate * 0.9, key


def test_a_part_that_no_name_has_is_an_error(trainer: Any) -> None:
    ended = trainer.ends("run", "--trainable-modules attn1,nothing_like_it", "sft")
    assert ended.code == 2
    assert "--trainable-modules nothing_like_it: no parameter has it in its name" in ended.err


def test_a_dot_trains_everything(trainer: Any) -> None:
    """As the published lines say it: every name has one."""
    dot, plain = (trainer.run(name, more, "sft") for name, more in (("dot", "--trainable-modules=."), ("plain", "")))
    assert weights(dot, 2).keys() == weights(plain, 2).keys()
    assert all(torch.equal(value, weights(plain, 2)[key]) for key, value in weights(dot, 2).items())


def test_the_average_follows_its_formula_in_fp32_and_is_what_samples(trainer: Any) -> None:
    """ema_1 = w_1, ema_n = d ema_(n-1) + (1 - d) w_n; also over a resume."""
    flags = "--ema-decay 0.75 --checkpoint-steps 1"
    run = trainer.run("run", f"{flags} --max-train-steps 2", "sft")
    trainer.run("run", f"{flags} --max-train-steps 4 --auto-resume", "sft")
    steps = [weights(run, step) for step in (1, 2, 3, 4)]
    averages = saved(run, 4, "ema")
    for key, average in averages.items():
        expected = steps[0][key]
        for step in steps[1:]:
            expected = 0.75 * expected + 0.25 * step[key]
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-5)
    student = load_student(str(run)).network.state_dict()
    assert all(torch.equal(student[key], average) for key, average in averages.items())
    assert not tiny.log_lines(run)[-1]["skipped"]


def test_a_stage_may_train_at_other_times(trainer: Any) -> None:
    """A shift is of the times of training here, not of a student's grid."""
    first = trainer.run("first", "", "sft")
    record = first / "checkpoints" / "torch_units" / "step-2.pt"
    second = trainer.run("second", f"--resume-ckpt {record} --shift 3 --max-train-steps 3", "sft")
    assert [line["step"] for line in tiny.log_lines(second)] == [3]
