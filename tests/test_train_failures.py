"""Whole tiny runs that meet updates that are not finite, and a full disk."""

from __future__ import annotations

import os

import pytest
import tiny
import torch
from tiny_runs import equal, record, weights

from train_t2i import losses
from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_DISK, EXIT_NON_FINITE

# -- updates that are not finite -------------------------------------------------------------------------------------


def poisoned(monkeypatch, kind: str, at) -> None:
    """The distribution matching loss of the updates in ``at`` (counted from 0) is or becomes not finite."""
    dmd, updates = losses.dmd, iter(range(100))

    def loss(x0, real, fake):
        value = dmd(x0, real, fake)
        if next(updates) not in at:
            return value
        if kind == "loss":
            return value * float("nan")
        return value + (x0 - x0.detach()).sum().abs().sqrt()  # finite, with an infinite slope

    monkeypatch.setattr(losses, "dmd", loss)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(trainer, monkeypatch, kind):
    clean = trainer.run("clean", "--checkpoint-steps 1 --max-train-steps 3")
    poisoned(monkeypatch, kind, {1})
    run = trainer.run("run", "--checkpoint-steps 1 --max-train-steps 3")
    assert [line["skipped"] for line in tiny.log_lines(run)] == [0, 1, 0]
    assert [line["step"] for line in tiny.log_lines(run)] == [1, 2, 3]  # it counts as a step
    assert [line["skipped"] for line in tiny.log_lines(run, "guidance")] == [0] * 6
    bad = tiny.log_lines(run)[1]
    assert bad["grad_norm"] is None
    assert (bad["loss"] is None) == (kind == "loss")
    files = [dict(tiny.checkpoint_files(run, step)) for step in (1, 2, 3)]
    for name in ("accelerator_1/model.safetensors", "accelerator_1/optimizer.safetensors"):
        assert equal(files[0][name], files[1][name])  # the weights and the optimizer are as they were
        assert not equal(files[1][name], files[2][name])
    assert equal(weights(clean, 1), weights(run, 1))
    assert not equal(weights(clean, 2), weights(run, 2))
    assert all(torch.isfinite(value).all() for value in weights(run, 3).values())
    assert "generator update skipped (1 in a row)" in (run / "log.txt").read_text()


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(trainer, monkeypatch):
    """Also where the guidance network's updates between them are fine."""
    poisoned(monkeypatch, "loss", range(1, 100))
    ended = trainer.ends("run", "--checkpoint-steps 1 --max-train-steps 9 --max-skipped 3")
    assert ended.code == EXIT_NON_FINITE
    run = trainer.root / "run"
    assert RunFolder(run).steps() == [3, 2, 1]
    assert "3 non-finite generator updates in a row" in ended.err
    assert str(record(run, 3)) in ended.err
    assert "Traceback" not in ended.err
    assert (run / ".exit_code").read_text() == f"{EXIT_NON_FINITE}\n"
    assert equal(weights(run, 1), weights(run, 3))


def test_a_good_update_starts_the_count_again_and_a_resume_does_not(trainer, monkeypatch):
    poisoned(monkeypatch, "loss", {0, 2, 3})
    trainer.run("run", "--max-train-steps 4 --max-skipped 3")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    poisoned(monkeypatch, "loss", range(100))
    ended = trainer.ends("run", "--max-train-steps 9 --max-skipped 3 --auto-resume")
    assert ended.code == EXIT_NON_FINITE
    assert "stopped at step 5" in ended.err  # two were counted before


def test_nothing_saved_yet(trainer, monkeypatch):
    poisoned(monkeypatch, "loss", range(100))
    ended = trainer.ends("run", "--max-skipped 1")
    assert ended.code == EXIT_NON_FINITE
    assert "no checkpoint was saved" in ended.err


# -- a full disk -----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_a_log_ends_in_one_line(trainer, monkeypatch):
    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("train_t2i.log.RunLog._write", full)
    ended = trainer.ends("run", "", "direct")
    assert ended.code == EXIT_DISK
    assert "No space left on device" in ended.err
    assert "Traceback" not in ended.err


def test_an_error_of_ours_is_not_hidden(trainer, monkeypatch):
    def wrong(*args, **options):
        raise OSError(5, "something else")

    monkeypatch.setattr("train_t2i.log.RunLog._write", wrong)
    with pytest.raises(OSError, match="something else"):
        trainer.ends("run", "", "direct")
    assert (trainer.root / "run" / ".exit_code").read_text() == "-1\n"


def test_the_marker_never_tells_of_an_earlier_run(trainer, first, monkeypatch):
    monkeypatch.setattr("train_t2i.train.prepare_and_loop", lambda *args: os._exit(9))  # killed in the middle
    pid = os.fork()
    if pid == 0:
        trainer.ends("first", "--batch-size 1 --auto-resume")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (first / ".exit_code").exists()
