"""Whole tiny runs inside this process: what is written, what is refused, sample sheets, reading processes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from PIL import Image
from tiny_runs import RL, record

from train_t2i.checkpoint import RunFolder
from train_t2i.config import fields_of
from train_t2i.errors import EXIT_DONE, EXIT_USER

# -- what is written -------------------------------------------------------------------------------------------------


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


PART = {f"{name}.{kind}" for name, kind in (("model", "safetensors"), ("optimizer", "safetensors"))}
PART |= {"optimizer.json", "scaler.json"}
EXPORT = {"adapter_model.safetensors", "adapter_config.json"}
SHEET = {"grid.png", "prompts.txt", "student_000.png", "student_001.png"}


@pytest.mark.parametrize("lora", [False, True])
def test_the_output_tree(trainer, lora):
    run = trainer.run("run", "--sample-steps 2 --checkpoint-steps 1" + (" --use-lora-gen" if lora else ""))
    expected = {"args.json", "environment.jsonl", "log.txt", ".lock", ".exit_code"}
    expected |= {f"loss_logs/loss_{role}_log.jsonl" for role in ("gen", "gui")}
    for step in (1, 2):
        expected |= {f"checkpoints/torch_units/step-{step}.pt"}
        expected |= {f"checkpoints/accelerator_{n}/step-{step}/{file}" for n in (1, 2) for file in PART}
        adapters = ("lora_gen", "lora_gui") if lora else ("lora_gui",)
        expected |= {f"checkpoints/{name}/step-{step}/{file}" for name in adapters for file in EXPORT}
    expected |= {f"samples/step {step}/{file}" for step in (0, 2) for file in SHEET}
    assert tree(run) == expected
    assert (run / ".exit_code").read_text() == "0\n"


def test_logs_are_json_lines_with_fixed_keys(trainer, towers):
    run = trainer.run("run", RL.format(**towers) + " --max-train-steps 3")
    counters, measured = ["tick", "step", "samples_seen"], ["seconds_tick", "peak_memory_gib"]
    common = ["grad_norm", "lr", "skipped", *measured]
    rewards = ["reward_clip", "loss_clip", "reward_hps", "loss_hps"]
    columns = {"gen": ["loss", "loss_dmd", "score_gap", *rewards], "gui": ["loss"]}
    for role, ticks in (("gen", [2, 4, 6]), ("gui", [1, 2, 3, 4, 5, 6])):
        text = (run / "loss_logs" / f"loss_{role}_log.jsonl").read_text()
        lines = [
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            for line in text.splitlines()
        ]
        assert [line["tick"] for line in lines] == ticks
        assert [line["samples_seen"] for line in lines] == [2 * tick for tick in ticks]
        assert [line["step"] for line in lines] == [tick // 2 for tick in ticks]
        assert all(list(line) == [*counters, *columns[role], *common] for line in lines)
        assert all(line["seconds_tick"] > 0 and line["grad_norm"] > 0 and line["skipped"] == 0 for line in lines)
        assert all(0.1 < line["peak_memory_gib"] < 24 for line in lines)


def test_args_json_holds_every_setting_as_it_was_understood(trainer, sdxl_folder):
    run = trainer.run("run", "--batch-size 1 --max-train-steps 1")
    args = json.loads((run / "args.json").read_text())
    assert args.keys() - {"code_version"} == set(fields_of("dmdr"))
    assert args["layout"] == "paired"
    assert args["model_family"] == "sdxl"
    assert args["pretrained_model"] == str(sdxl_folder)
    assert args["learning_rate_gen"] == 1e-3


def test_a_second_run_in_a_folder_is_refused(trainer, first):
    before = {path: (first / path).read_bytes() for path in tree(first) - {".exit_code"}}
    ended = trainer.ends("first", "--batch-size 1")
    assert ended.code == EXIT_USER
    assert "already holds a run" in ended.err
    assert "--auto-resume" in ended.err
    assert {path: (first / path).read_bytes() for path in tree(first) - {".exit_code"}} == before


def test_a_stage_does_not_write_over_a_run(trainer, first):
    """Launchers always name the stage before: a second start with other settings is no reason to lose the first."""
    flags = f"--batch-size 1 --resume-ckpt {record(first, 2)} --max-train-steps 3"
    stage = trainer.run("stage", flags)
    before = {path: (stage / path).read_bytes() for path in tree(stage) - {".exit_code"}}
    ended = trainer.ends("stage", f"{flags} --learning-rate-gen 1e-2")
    assert ended.code == EXIT_USER
    assert "already holds a run" in ended.err
    assert {path: (stage / path).read_bytes() for path in tree(stage) - {".exit_code"}} == before


def test_a_run_without_an_intact_checkpoint_is_not_started_anew(trainer, first):
    record(first, 2).write_bytes(b"torn")
    ended = trainer.ends("first", "--batch-size 1 --auto-resume")
    assert ended.code == EXIT_USER
    assert "no checkpoint of this run is intact" in ended.err
    assert tiny.log_lines(first)


def test_a_stage_without_a_step_to_make_is_refused(trainer, first):
    ended = trainer.ends("stage", f"--batch-size 1 --resume-ckpt {record(first, 2)} --max-train-steps 2")
    assert ended.code == EXIT_USER
    assert "--max-train-steps 2" in ended.err
    assert "above 2" in ended.err


def test_a_finished_run_is_left_as_it_is(trainer, first):
    again = trainer.run("first", "--batch-size 1 --auto-resume")
    assert RunFolder(again).steps() == [2]
    assert len(tiny.log_lines(again)) == 2


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ("", [3]),
        ("--checkpoint-steps 2", [3, 2]),
        ("--checkpoint-steps 1 --checkpoints-total-limit 2", [3, 2]),
        ("--checkpoint-minutes 1e-9", [3, 2, 1]),
    ],
)
def test_when_checkpoints_are_saved(trainer, more, steps):
    """The last step always is."""
    run = trainer.run("run", f"--max-train-steps 3 --batch-size 1 {more}", "direct")
    assert RunFolder(run).steps() == steps
    assert all(RunFolder(run).damage(record(run, step)) is None for step in steps)


def test_minutes_count_from_the_last_save(trainer, monkeypatch):
    from train_t2i import log, resume, run, train

    clock, flush = SimpleNamespace(now=time.monotonic()), log.RunLog.end_tick
    for module in (train, resume, run):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now), raising=False)

    def forty_seconds_later(self, *counters):
        clock.now += 40
        flush(self, *counters)

    monkeypatch.setattr(log.RunLog, "end_tick", forty_seconds_later)
    made = trainer.run("run", "--max-train-steps 5 --batch-size 1 --checkpoint-minutes 1", "direct")
    assert RunFolder(made).steps() == [5, 4, 2]


def test_what_is_logged_does_not_depend_on_when_it_is_written(trainer, monkeypatch):
    """Every two steps, before a checkpoint, and at the end; a line an update all the same."""
    from train_t2i.log import RunLog

    every = trainer.run("every", "--max-train-steps 5 --batch-size 1", "direct")
    written, write = [], RunLog.write

    def noted(self):
        lines = write(self)
        written.append([line["step"] for _, line in lines])
        return lines

    monkeypatch.setattr(RunLog, "write", noted)
    second = trainer.run(
        "second", "--max-train-steps 5 --batch-size 1 --logging-steps 2 --checkpoint-steps 3", "direct"
    )
    tiny.assert_same_logs(every, second)
    assert [lines for lines in written if lines] == [[1, 2], [3], [4], [5]]


def test_the_logs_of_a_first_attempt_that_saved_nothing_are_cut(trainer):
    whole = trainer.run("whole", "--max-train-steps 2", "direct")
    logs = trainer.root / "again" / "loss_logs"
    logs.mkdir(parents=True)
    shutil.copy(whole / "loss_logs" / "loss_gen_log.jsonl", logs)
    (logs / "loss_gui_log.jsonl").write_text('{"tick": 1')
    again = trainer.run("again", "--max-train-steps 2 --auto-resume", "direct")
    tiny.assert_same_logs(whole, again)


def test_a_torn_line_is_cut(trainer, first):
    for name in ("gen", "gui"):
        with open(first / "loss_logs" / f"loss_{name}_log.jsonl", "a") as file:
            file.write('{"tick": 5, "step')
    again = trainer.run("first", "--batch-size 1 --auto-resume --max-train-steps 3")
    assert [line["tick"] for line in tiny.log_lines(again, "guidance")] == [1, 2, 3, 4, 5, 6]


# -- sample sheets ---------------------------------------------------------------------------------------------------


def test_sampling_does_not_change_training(trainer):
    flags = "--max-train-steps 3 --checkpoint-steps 1 --sample-num-steps 2"
    plain, sampled = (
        trainer.run("plain", flags),
        trainer.run("sampled", f"{flags} --sample-steps 1 --batch-size-test 3"),
    )
    tiny.assert_same_checkpoint(plain, sampled, 3)
    tiny.assert_same_logs(plain, sampled)


def test_sheets_have_the_same_noise_and_prompts_every_time_and_the_teacher_beside(trainer, prompts_file):
    still = trainer.run("still", "--learning-rate-gen 0 --learning-rate-gui 0 --sample-steps 1 --sample-num-steps 2")
    sheets = [still / "samples" / f"step {step}" for step in range(3)]
    for sheet in sheets[1:]:
        for file in SHEET:
            assert (sheet / file).read_bytes() == (sheets[0] / file).read_bytes(), (sheet.name, file)
    assert (sheets[0] / "prompts.txt").read_text().splitlines() == prompts_file.read_text().splitlines()[:2]
    assert (sheets[0] / "student_000.png").read_bytes() != (sheets[0] / "student_001.png").read_bytes()
    student, grid = Image.open(sheets[0] / "student_000.png"), Image.open(sheets[0] / "grid.png")
    assert student.size == (32, 32)
    assert grid.size == (2 * 34 + 2, 2 * 34 + 2)  # student above, teacher below
    assert grid.crop((2, 2, 34, 34)).tobytes() == student.tobytes()
    moved = trainer.run("moved", "--sample-steps 2 --learning-rate-gen 1e-2 --sample-num-steps 2")
    grids = [Image.open(moved / "samples" / f"step {step}" / "grid.png") for step in (0, 2)]
    students, teachers = ([g.crop((0, top, 70, top + 34)).tobytes() for g in grids] for top in (2, 36))
    assert students[0] != students[1]
    assert teachers[0] == teachers[1]


def test_sheets_of_methods_without_a_teacher_and_prompts_of_ones_own(trainer, tmp_path):
    (tmp_path / "own.txt").write_text("one\n\ntwo\nthree\n")
    run = trainer.run("run", f"--sample-steps 1 --sample-prompts {tmp_path / 'own.txt'} --max-train-steps 1", "direct")
    sheet = run / "samples" / "step 1"
    assert (sheet / "prompts.txt").read_text() == "one\ntwo\n"
    assert Image.open(sheet / "grid.png").size == (2 * 34 + 2, 34 + 2)


# -- data in other processes -----------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_one_line_from_a_reading_process(trainer, tmp_path):
    table = tiny.save_images(tmp_path / "images", count=2)
    (table.parent / "1.png").write_bytes(b"\x89PNG broken")
    ended = trainer.ends("run", f"--data-path-train {table} --num-workers 1 --batch-size-test 1", "sft")
    assert ended.code == EXIT_USER
    assert "1.png" in ended.err
    assert "Traceback" not in ended.err


def test_reading_processes_change_nothing(trainer):
    alone = trainer.run("alone", "--num-workers 0", "sft")
    tiny.assert_same_checkpoint(alone, trainer.run("helped", "--num-workers 2", "sft"), 2)


def test_done_is_zero(first):
    assert (first / ".exit_code").read_text() == f"{EXIT_DONE}\n"
