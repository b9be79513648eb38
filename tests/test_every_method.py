"""What the loop promises, held by every method: a stop in the middle, an update that is not finite, the report of it all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from flow_models import save_flow
from tiny_runs import equal, weights

from train_t2i.__main__ import main
from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_DONE, EXIT_PREEMPTED
from train_t2i.log import RunLog
from train_t2i.methods import METHODS
from train_t2i.report_data import read_run

FLAGS = {
    "dmdr": "--sample-num-steps 2",
    "direct": "--use-lora-gen --lora-rank 2 --sample-num-steps 2 --sample-type ode",
    "arcflow": "--pretrained-model {flux} --text-length 24 --use-lora-gen --lora-rank 2 --sample-num-steps 2 --shift 3.2 "
    "--num-components 3 --mixing-steps 2 --distill-cfg 1 --ema-start 1 --teacher-cfg 1 --teacher-num-steps 2",
    "sft": "--caption-dropout 0.5",
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flow(tmp_path_factory.mktemp("flux") / "flux", "flux")


def test_no_method_is_left_out() -> None:
    assert set(FLAGS) == set(METHODS)


@pytest.mark.parametrize("method", FLAGS)
def test_a_stop_in_the_middle_goes_on_as_if_it_had_not_been(method: str, trainer: Any, flux: Path, monkeypatch) -> None:
    """SIGTERM in the second step: it is finished, saved and told; the same command ends where an unbroken run does."""
    flags = f"{FLAGS[method].format(flux=flux)} --batch-size 1 --max-train-steps 3 --sample-steps 3 --auto-resume"
    whole = trainer.run("whole", flags, method)
    flush = RunLog.end_tick

    def asked_to_stop(self: RunLog, tick: int, step: int, samples_seen: int) -> None:
        flush(self, tick, step, samples_seen)
        if tick == (3 if method == "dmdr" else 2):  # DMDR's steps are two ticks
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "end_tick", asked_to_stop)
        assert trainer.ends("run", flags, method).code == EXIT_PREEMPTED
    run = trainer.root / "run"
    assert RunFolder(run).steps() == [2]
    assert trainer.run("run", flags, method) == run
    tiny.assert_same_checkpoint(whole, run, 3)
    tiny.assert_same_logs(whole, run)
    pictures = [sorted((root / "samples" / "step 3").glob("*.png")) for root in (whole, run)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]

    assert main(["report", str(run), "--out", str(trainer.root / "page")]) == EXIT_DONE
    series = read_run(str(run)).series
    for name, value in tiny.log_lines(run)[-1].items():
        if name not in ("tick", "step", "samples_seen") and value is not None:
            assert len(series[f"gen/{name}"][1]) == 3, name
    page = (trainer.root / "page" / "index.html").read_text(encoding="utf-8")
    assert f"<dd>{method}</dd>" in page
    assert "<dt>peak memory</dt>" in page


@pytest.mark.parametrize("method", FLAGS)
def test_an_update_that_is_not_finite_changes_nothing(method: str, trainer: Any, flux: Path, monkeypatch) -> None:
    losses = METHODS[method].losses

    def poisoned(self: Any, role: str, rollout: Any, clock: Any) -> Iterator[Any]:
        for loss, metrics in losses(self, role, rollout, clock):
            yield (loss * float("nan") if role == "generator" and clock.step == 1 else loss), metrics

    monkeypatch.setattr(METHODS[method], "losses", poisoned)
    flags = f"{FLAGS[method].format(flux=flux)} --batch-size 1 --max-train-steps 3 --checkpoint-steps 1"
    run = trainer.run("run", flags, method)
    assert [line["skipped"] for line in tiny.log_lines(run)] == [0, 1, 0]
    files = [dict(tiny.checkpoint_files(run, step)) for step in (1, 2)]
    for name in ("accelerator_1/model.safetensors", "accelerator_1/optimizer.safetensors"):
        assert equal(files[0][name], files[1][name])
    assert not equal(weights(run, 2), weights(run, 3))
    assert all(torch.isfinite(value).all() for value in weights(run, 3).values())
