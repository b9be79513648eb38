"""Whole tiny runs that are watched: what a reading is, that it changes nothing, what the guard does, and going on exactly."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny_runs import pixels, record, refused, stopped_at

import rewards
from shapes.bait import saturation
from train_t2i import monitor
from train_t2i.__main__ import main
from train_t2i.checkpoint import RunFolder
from train_t2i.errors import EXIT_DONE, EXIT_GAMED, EXIT_USER
from train_t2i.metrics import recall, spread
from train_t2i.report_data import read_run
from train_t2i.sheet import SampleSheet

# Colours alone are followed, from step 1 on, so fast that what the random towers see falls: within four steps it is a game.
WATCHED = (
    "--batch-size 1 --cold-start-iter 1 --extra-rewards 30*shapes.bait:saturation --extra-reward-margin 2 "
    "--dmd-weight 1e-3 --learning-rate-gen 1e-2 "
    "--monitor-rewards clip={clip},hpsv2={hpsv2} --monitor-seeds 3 --sample-steps 1 --teacher-num-steps 1"
)
EAGER = "--guard-reward-drop 0 --guard-diversity-drop 0"  # any sure fall counts


@pytest.fixture
def flags(towers) -> str:
    return WATCHED.format(**towers)


def readings(run: Path, step: int) -> list[dict]:
    _, saved = RunFolder(run).load(record(run, step), [])
    return saved["readings"]


def lines(run: Path) -> list[dict]:
    return tiny.log_lines(run, "monitor")


# -- what is read ----------------------------------------------------------------------------------------------------


def test_a_reading_is_what_the_rewards_say_of_the_sheets_images(trainer, flags, towers, images_table):
    run = trainer.run("run", f"{flags} --monitor-reference {images_table} --max-train-steps 1")
    (line,) = [line for line in lines(run) if line["step"] == 1]
    columns = ["reward_saturation", "held_out_clip", "held_out_hpsv2", "diversity", "recall", "guard_scale"]
    assert [*line] == ["tick", "step", "samples_seen", *columns]
    reading = readings(run, 1)[-1]
    scores = reading["training"] | reading["held_out"] | {"diversity": reading["diversity"]}
    assert {name: len(values) for name, values in scores.items()} == {**dict.fromkeys(columns[:3], 6), "diversity": 2}
    assert {name: line[name] for name in scores} == pytest.approx({k: sum(v) / len(v) for k, v in scores.items()})
    # the first of each prompt is the sheet's, here as it was saved in 8 bits
    saved = torch.stack([pixels(run / "samples" / "step 1" / f"student_00{i}.png") for i in range(2)])
    images, prompts = saved.permute(0, 3, 1, 2) / 255, ["a red circle number 0", "a blue circle number 1"]
    assert reading["training"]["reward_saturation"][:2] == pytest.approx(
        saturation(images, prompts).tolist(), abs=2 / 255
    )
    for name in ("clip", "hpsv2"):
        expected = rewards.REWARDS[name](towers[name])(images, prompts)
        assert reading["held_out"][f"held_out_{name}"][:2] == pytest.approx(expected.tolist(), abs=0.01)


def test_diversity_and_recall_are_of_the_first_towers_features(trainer, flags, towers, images_table, monkeypatch):
    made, student = [], SampleSheet.student

    def kept(self, seed):
        made.append(student(self, seed))
        return made[-1]

    monkeypatch.setattr(SampleSheet, "student", kept)
    run = trainer.run("run", f"{flags} --monitor-reference {images_table} --max-train-steps 1 --learning-rate-gen 0")
    tower = rewards.REWARDS["clip"](towers["clip"])
    features = torch.stack([tower.encode_images(images) for images in made[-3:]])
    assert lines(run)[-1]["diversity"] == pytest.approx(float(spread(features).mean()), rel=1e-6)
    table = torch.stack([pixels(images_table.parent / f"{i}.png").permute(2, 0, 1) / 255 for i in range(6)])
    expected = recall(features.flatten(0, 1), tower.encode_images(table))
    assert lines(run)[-1]["recall"] == pytest.approx(expected)
    assert not torch.equal(made[-1], made[-2])  # other seeds, other images


def test_a_reward_of_weight_0_is_in_no_loss(trainer, flags, towers):
    more = f"--clip-reward-model {towers['clip']} --reward-clip-weight 0 --max-train-steps 1"
    run = trainer.run("run", f"{flags} {more}")
    reading = readings(run, 1)[-1]
    assert [*reading["training"]] == ["reward_saturation"]
    assert [*reading["held_out"]] == ["reward_clip", "held_out_clip", "held_out_hpsv2"]
    assert reading["held_out"]["reward_clip"] == reading["held_out"]["held_out_clip"]


def test_readings_are_taken_where_rewards_begin_and_at_multiples(trainer, flags):
    run = trainer.run("run", f"{flags} --cold-start-iter 3 --sample-steps 2 --max-train-steps 5")
    assert [line["step"] for line in lines(run)] == [0, 2, 3, 4]  # and not at the last step


def test_watching_changes_nothing(trainer, flags):
    alone = flags[: flags.index("--monitor-rewards")]
    more = f"{EAGER} --reward-guard warn --max-train-steps 3"
    tiny.assert_same_checkpoint(
        trainer.run("watched", f"{flags} {more}"), trainer.run("alone", f"{alone} --max-train-steps 3"), 3
    )


# -- what the guard does ---------------------------------------------------------------------------------------------


def test_a_game_is_told_once_and_changes_nothing_else(trainer, flags):
    run = trainer.run("run", f"{flags} {EAGER} --reward-guard warn --max-train-steps 5")
    said = [line for line in (run / "log.txt").read_text().splitlines() if "warning: reward guard: step" in line]
    assert said
    assert all("rose: reward_saturation" in line for line in said)
    fell = [name for line in said for name in ("held_out_clip", "held_out_hpsv2", "diversity") if f"{name} " in line]
    assert len(fell) == len(set(fell))  # nothing came back here, so nothing is told again
    assert {line["guard_scale"] for line in lines(run)} == {1}


def test_scaling_takes_the_weights_down_in_the_loss(trainer, flags):
    run = trainer.run("run", f"{flags} {EAGER} --reward-guard scale --guard-factor 0.25 --max-train-steps 6")
    scales = [line["guard_scale"] for line in lines(run)]  # as each reading found it
    assert scales[:3] == [1, 1, 1]
    assert 0.25 in scales
    assert scales == sorted(scales, reverse=True)
    assert "rewards now count 0.25: rose: reward_saturation" in (run / "log.txt").read_text()
    for line, scale in zip(tiny.log_lines(run)[1:], scales[2:], strict=True):
        rewarded = line["loss"] - 1e-3 * line["loss_dmd"]
        assert rewarded == pytest.approx(scale * 30 * line["loss_saturation"], rel=1e-4)


def test_stopping_saves_names_the_last_good_checkpoint_and_stays_stopped(trainer, flags, monkeypatch):
    more = f"{flags} {EAGER} --checkpoint-steps 1 --checkpoints-total-limit 1 --max-train-steps 9 --auto-resume"
    judge, saves, asked, over = monitor.gamed, RunFolder.save, threading.Event(), threading.Event()

    def gamed(*given):
        found = judge(*given)
        if found:
            over.set()
        asked.set()
        return found

    def slowly(self, *parts):  # the good checkpoint is still on its way to the disk when the verdict falls
        if not over.is_set():
            asked.clear()
            asked.wait(10)
            time.sleep(0.2)
        saves(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", slowly)
        patch.setattr(monitor, "gamed", gamed)
        ended = trainer.ends("run", f"{more} --reward-guard stop")
    run = trainer.root / "run"
    assert ended.code == EXIT_GAMED
    assert (run / ".exit_code").read_text() == f"{EXIT_GAMED}\n"
    last, good = RunFolder(run).steps()
    assert good < last < 9
    assert f"stopped at step {last} and saved: rose: reward_saturation" in ended.err
    assert f"last good checkpoint: {record(run, good)}; " in ended.err
    assert not RunFolder(run).damage(record(run, good))
    with monkeypatch.context() as patch:
        patch.setattr("train_t2i.build.build_family", lambda *args: pytest.fail("loaded a model"))
        again = trainer.ends("run", f"{more} --reward-guard stop")
    assert again.code == EXIT_GAMED
    assert again.err.splitlines()[-2:] == ended.err.splitlines()[-2:]
    assert RunFolder(run).steps() == [last, good]
    lower = f"{flags} --resume-ckpt {record(run, good)} --max-train-steps {good + 1} --extra-rewards 1*shapes.bait:saturation"
    trainer.run("new", lower)
    trainer.run("run", f"{more} --reward-guard warn --max-train-steps {last + 1}")  # the user's word


def test_a_stage_may_name_what_it_started_from(trainer, flags):
    start = trainer.run("start", f"{flags} --max-train-steps 1")
    more = f"{EAGER} --reward-guard stop --checkpoint-steps 100 --max-train-steps 9 --resume-ckpt {record(start, 1)}"
    ended = trainer.ends("run", f"{flags} {more}")
    assert ended.code == EXIT_GAMED
    assert f"last good checkpoint: {record(start, 1)}; " in ended.err
    (saved,) = RunFolder(trainer.root / "run").steps()  # nothing else was due
    assert f"stopped at step {saved} and saved" in ended.err


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7])
def test_a_guarded_run_that_was_stopped_goes_on_bit_for_bit(trainer, flags, step):
    """12 = 7 + 5, and a stop before the first scaling: weights, optimizers, logs, readings and the scale."""
    more = f"{flags} {EAGER} --reward-guard scale --max-train-steps 12"
    whole = trainer.run("whole", f"{more} --checkpoint-steps 1 --sample-steps 2")
    scales = [line["guard_scale"] for line in lines(whole)]
    assert scales[0] == 1
    assert scales[-1] < 1
    resumed = stopped_at(whole, step, "resumed")
    again = trainer.run("resumed", f"{more} --checkpoint-steps 12 --sample-steps 2 --resume-ckpt latest")
    tiny.assert_same_checkpoint(whole, again, 12)
    tiny.assert_same_logs(whole, again)
    assert resumed == again
    assert lines(whole) == lines(again)
    assert readings(whole, 12) == readings(again, 12)
    records = [RunFolder(run).load(record(run, 12), [])[1] for run in (whole, again)]
    assert records[0]["reward_scale"] == records[1]["reward_scale"] < 1


def test_a_run_in_two_pieces_has_the_readings_of_one(trainer, flags):
    """Its first piece ends at a last step that is no multiple: a reading there would be one too many."""
    more = f"{flags} {EAGER} --reward-guard scale --sample-steps 2 --auto-resume"
    whole = trainer.run("whole", f"{more} --max-train-steps 5")
    trainer.run("pieces", f"{more} --max-train-steps 3")
    pieces = trainer.run("pieces", f"{more} --max-train-steps 5")
    tiny.assert_same_checkpoint(whole, pieces, 5)
    assert lines(whole) == lines(pieces)


def test_a_stage_begins_with_readings_of_its_own_and_whole_weights(trainer, flags):
    more = f"{flags} {EAGER} --reward-guard scale --max-train-steps 4"
    first = trainer.run("first", more)
    assert RunFolder(first).load(record(first, 4), [])[1]["reward_scale"] < 1
    second = trainer.run("second", f"{more} --resume-ckpt {record(first, 4)} --max-train-steps 5")
    assert [(line["step"], line["guard_scale"]) for line in lines(second)] == [(4, 1), (5, 1)]


@pytest.mark.parametrize("other", ["--batch-size-test 3", "--monitor-seeds 2", "--monitor-rewards clip={clip}"])
def test_readings_of_other_images_are_not_compared(trainer, flags, towers, other):
    trainer.run("run", f"{flags} --max-train-steps 1")
    ended = trainer.ends("run", f"{flags} --max-train-steps 2 --auto-resume {other.format(**towers)}")
    assert ended.code == EXIT_USER
    assert f"{other.split()[0].removeprefix('--').replace('-', '_')}: checkpoint=" in ended.err


# -- mistakes --------------------------------------------------------------------------------------------------------

GUARDED = "--extra-rewards 0.3*shapes.bait:saturation --monitor-rewards clip=x"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--extra-rewards 0.3*a:b --reward-guard warn", "--reward-guard warn has nothing to judge by"),
        (f"{GUARDED} --reward-guard warn --sample-steps 0", "looks at every --sample-steps, which is 0"),
        (f"{GUARDED} --reward-guard stop --checkpoint-steps 0", "--checkpoint-steps 0 leaves none"),
        (f"{GUARDED} --reward-guard scale --dmd-weight 0 --cold-start-iter 0", "do not depend on the scale"),
        ("--monitor-rewards clip", "--monitor-rewards clip: is not NAME=PATH"),
        ("--monitor-rewards clip=a,clip=b", "--monitor-rewards clip=b: is given twice"),
    ],
)
def test_a_guard_that_cannot_work_is_refused(capsys, given, told):
    assert told in refused(capsys, "train", *given.split())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--monitor-rewards taste={clip}", "--monitor-rewards taste: is no reward"),
        ("--monitor-rewards clip={clip}-gone", "clip-gone"),
        ("--monitor-rewards clip={clip} --batch-size-test 1", "--monitor-rewards: 1 sample prompts"),
        ("--monitor-rewards clip={clip} --monitor-reference {prompts}", "is not a table"),
        ("--extra-rewards 1*shapes.bait:taste", "--extra-rewards shapes.bait:taste: "),
        ("--extra-rewards 1*saturation=x", "--extra-rewards saturation: is no reward"),
        ("--extra-rewards 1*builtins:len --cold-start-iter 0", "builtins:len: failed (TypeError: "),
        ("--extra-rewards 1*shapes.bait:Sequence.count", "--extra-rewards shapes.bait:Sequence.count: "),
    ],
)
def test_what_cannot_be_watched_is_told_before_it_trains(trainer, towers, prompts_file, more, told):
    ended = trainer.ends("run", f"--sample-steps 1 {more.format(prompts=prompts_file, **towers)}")
    assert ended.code == EXIT_USER
    assert told in f"{ended.err}".replace("\nhint: ", " (")
    assert "Traceback" not in ended.err


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_report_draws_what_was_watched(trainer, flags, images_table):
    run = trainer.run("run", f"{flags} --monitor-reference {images_table} --max-train-steps 3")
    story = read_run(str(run))
    steps, values = story.series["mon/held_out_clip"]
    assert steps == [line["step"] for line in lines(run)]
    assert values == [line["held_out_clip"] for line in lines(run)]
    assert story.seconds > 0
    out = trainer.root / "report"
    assert main(["report", str(run), "--out", str(out)]) == EXIT_DONE
    assert (out / "plots" / "watched.png").is_file()
    assert "Rewards on fixed prompts" in (out / "index.html").read_text(encoding="utf-8")
    json.loads((run / "loss_logs" / "monitor_log.jsonl").read_text().splitlines()[0])
