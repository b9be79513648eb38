"""The benchmark: one tiny row as its JSON tells it, and what is refused before a model loads."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flow_models import save_flow
from reward_towers import write_folder
from test_scripts import launched

from train_t2i.__main__ import main
from train_t2i.benchmark import BenchmarkConfig, page, settings_of
from train_t2i.benchmark.rows import Row, attempt, combinations, fresh
from train_t2i.benchmark.step import measure
from train_t2i.cli import parse, parse_verb
from train_t2i.errors import UserError
from train_t2i.families.published import PUBLISHED
from train_t2i.plan.floor import floor
from train_t2i.plan.model import published_of
from train_t2i.plan.rehearsal import rehearse


def flags(sdxl: Path, prompts: Path, out: Path) -> list[str]:
    return shlex.split(
        f"--pretrained-model {sdxl} --data-path-train {prompts} --out {out} "
        "--resolution 32 --batch-size 2 --mixed-precision no"
    )


WHOLE_STEPS = shlex.split("--layouts shared --lora-rank 2 --ratio-update 2 --steps 1")


@pytest.fixture
def arguments(sdxl_folder, prompts_file, tmp_path) -> list[str]:
    return flags(sdxl_folder, prompts_file, tmp_path / "new" / "out.json")


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """A row without the seconds that a process of its own needs to start."""
    monkeypatch.setattr("train_t2i.benchmark.step.fresh", lambda call, given, *_: attempt(call, given))


def test_a_row_says_where_the_time_of_a_step_goes(arguments, tiny_vae_folder, in_this_process, tmp_path, capsys):
    tower = write_folder(tmp_path / "clip", "clip")
    rewards = ["--clip-reward-model", str(tower), "--tiny-vae", str(tiny_vae_folder)]
    assert main(["benchmark", *arguments, *WHOLE_STEPS, *rewards]) == 0
    told = json.loads((tmp_path / "new" / "out.json").read_text())
    assert told["settings"]["ratio_update"] == 2
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == told["rows"]
    assert [(row["layout"], row["gradient_checkpointing"]) for row in told["rows"]] == [
        ("shared", False),
        ("shared", True),
    ]
    for row in told["rows"]:
        split = row["seconds_of_a_step"]
        assert set(split) == {
            "data", "text_encoding", "rollout", "guidance_update", "generator_update", "rewards_forward"
        }  # fmt: skip
        assert all(seconds > 0 for seconds in split.values())
        assert sum(split.values()) <= row["seconds_step"] == 2 * row["seconds_tick"]
        assert row["images_per_second"] == pytest.approx(2 * 2 / row["seconds_step"])
        assert row["network_calls_step"] == 2 * (1 + 1) + 4  # R (N + 1) + 4
        assert row["peak_memory_gib"] > 0
        assert row["device"]
        assert 0 < row["share_outside_network_calls"] < 1
        assert row["network_flops_per_second"] == row["network_flops_step"] / row["seconds_step"]
        assert row["model_flop_utilisation"] is None  # no card is known
    assert told["rows"][0]["network_flops_step"] == told["rows"][1]["network_flops_step"]  # nothing made again counts
    written = (tmp_path / "new" / "out.md").read_text()
    assert written.startswith(
        "model sdxl, layout shared, schedule ours, backend ddp, processes 1, format no, compile off, batch 2,"
    )
    assert written.count("\n| o") == 2
    for kind, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "new" / f"out.{kind}").read_bytes().startswith(begin)


def test_the_reward_stage_costs_less_memory_and_gives_the_same_gradient(arguments, tmp_path, capsys):
    tower = write_folder(tmp_path / "clip", "clip")
    more = ["--part", "rewards", "--clip-reward-model", str(tower), "--hpsv2-reward-model", str(tower)]
    assert main(["benchmark", *arguments, *more, "--batch-size", "4"]) == 0
    plain, checkpointed, parts, both = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    assert [(row["gradient_checkpointing"], row["rows_at_a_time"]) for row in (plain, checkpointed, parts, both)] == [
        (False, 4), (True, 4), (False, 1), (True, 1)
    ]  # fmt: skip
    assert plain["gradient_off_by"] == {"median_row": 0, "worst_row": 0}
    assert all(row["gradient_off_by"]["median_row"] < 1e-4 for row in (checkpointed, parts, both))
    assert 0 < both["peak_mb"] < parts["peak_mb"] < plain["peak_mb"] / 2
    assert checkpointed["peak_mb"] < plain["peak_mb"]


def test_the_published_schedule_makes_the_same_gradients_with_more_calls_and_memory(arguments, tmp_path, capsys):
    more = shlex.split("--part published --batch-size 3 --sample-num-steps 2 --lora-rank 2 --ratio-update 2 --steps 1")
    assert main(["benchmark", *arguments, *more]) == 0
    rows = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    published, ours, checkpointed = rows
    assert [row["schedule"] for row in rows] == ["published", "ours", "ours, checkpointed"]
    for row in rows:
        assert set(row["gradient_off_by"]) == {"generator", "guidance"}
        assert all(off < 1e-4 for off in row["gradient_off_by"].values())
        assert 0 < row["share_outside_network_calls"] < 1
        assert row["seconds_of_a_step"]["network_forward"] + row["seconds_of_a_step"]["backward"] < row["seconds_step"]
    assert published["of_published"] == {"seconds": 1, "peak": 1}
    assert published["rows_through_the_network_step"] == 3 * (2 * (2 + 1) + 4)  # B (R (N + 1) + 4)
    assert ours["rows_through_the_network_step"] == 30 - 5  # of the six rows simulated one drew the second level
    assert checkpointed["rows_through_the_network_step"] == ours["rows_through_the_network_step"]
    assert checkpointed["of_published"]["peak"] < ours["of_published"]["peak"] < 1
    assert "text_encoding" in published["seconds_of_a_step"]
    assert "text_encoding" not in ours["seconds_of_a_step"]


def test_the_counted_flops_are_those_that_plan_says(arguments, in_this_process, tmp_path, capsys):
    """Of network calls, attention by the CPU's fused kernel: what it makes again is not counted."""
    more = ["--layouts", "paired", "--checkpointing", "off", "--models", str(_of(arguments, "--pretrained-model"))]
    assert main(["benchmark", *arguments, *WHOLE_STEPS, *more]) == 0
    (row,) = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    flags_of_plan = (
        f"--pretrained-model {_of(arguments, '--pretrained-model')} --layout paired --lora-rank 2 --batch-size 2"
    )
    settings = parse(shlex.split(f"{flags_of_plan} --resolution 32 --mixed-precision no --ratio-update 2"))
    settings = replace(settings, run=replace(settings.run, model_family="sdxl", backend="ddp"))
    found = rehearse(settings, published_of(settings.run, None)[1], gradient_share=1.0, gathered=False)
    assert row["network_flops_step"] == sum(floor(settings.run, found, 1).network.values())


def _of(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_rows_are_the_product_of_the_lists():
    config = BenchmarkConfig(
        models="sdxl,a/folder", layouts="shared,paired", backends="ddp,fsdp2", mixed_precision="no,bf16",
        checkpointing="on", compile="off,blocks", schedules="ours,published",
    )  # fmt: skip
    rows = combinations(config)
    assert len(rows) == len(set(rows)) == 2**6
    assert rows[0] == Row("sdxl", "shared", "ddp", "no", True, "off", "ours")
    assert rows[-1] == Row("a/folder", "paired", "fsdp2", "bf16", True, "blocks", "published")
    assert [row.is_random for row in (rows[0], rows[-1])] == [True, False]
    for flag_name, words in (("--checkpointing", "yes"), ("--backends", "ddp,none"), ("--schedules", "theirs")):
        with pytest.raises(UserError, match=f"{flag_name} .*unknown"):
            combinations(BenchmarkConfig(**{flag_name[2:]: words}))


def test_what_becomes_of_a_row_is_its_result(arguments, in_this_process, monkeypatch, tmp_path, capsys):
    """Refused, out of memory, failed: the next is measured; and --append keeps them all."""

    def measured(config: BenchmarkConfig, row: Row):
        if row.layout == "shared":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        if row.layout == "paired":
            raise ValueError("no such thing")
        raise UserError("this row: cannot be", "leave it out")

    monkeypatch.setattr("train_t2i.benchmark.step.measure", measured)
    more = ["--layouts", "shared,paired,separate", "--checkpointing", "off", "--backends", "ddp,fsdp2", "--append"]
    assert main(["benchmark", *arguments, *more]) == 0
    assert main(["benchmark", *arguments, "--layouts", "separate", "--checkpointing", "on", "--append"]) == 0
    rows = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    assert [next(row[why] for why in page.WITHOUT_FIGURES if why in row) for row in rows] == [
        "CUDA out of memory. Tried to allocate 2 GiB", "fsdp2 with one process is plain training (give --num-processes)",
        "ValueError: no such thing", "fsdp2 with one process is plain training (give --num-processes)",
        "this row: cannot be (leave it out)", "fsdp2 with one process is plain training (give --num-processes)",
        "this row: cannot be (leave it out)",
    ]  # fmt: skip
    told = (tmp_path / "new" / "out.md").read_text()
    assert "| out of memory: CUDA out of memory. Tried to allocate 2 GiB | |" in " ".join(told.split())
    assert not (tmp_path / "new" / "out.png").exists()


FIGURES = {
    "seconds_step": 2.0, "seconds_of_a_step": {"rollout": 0.5, "generator_update": 1.4}, "images_per_second": 10,
    "share_outside_network_calls": 0.05, "peak_memory_gib": 20.0, "network_flops_step": 8e14,
    "network_flops_per_second": 4e14, "model_flop_utilisation": 0.404, "device": "a card",
}  # fmt: skip


def test_append_measures_what_has_no_figures_yet(arguments, in_this_process, monkeypatch, tmp_path, capsys):
    """A row that was refused or failed is measured again, in place of what it said; so is one of other settings."""
    asked: list[tuple[str, bool]] = []

    def measured(config: BenchmarkConfig, row: Row):
        asked.append((row.layout, row.checkpointing))
        if row.layout == "paired" and len(asked) <= 4:
            raise ValueError("no such thing")
        return FIGURES

    monkeypatch.setattr("train_t2i.benchmark.step.measure", measured)
    benchmark = ["benchmark", *arguments, "--layouts", "shared,paired", "--append"]
    assert main(benchmark) == 0
    everything = [("shared", False), ("shared", True), ("paired", False), ("paired", True)]
    assert asked == everything
    assert "skipped" not in capsys.readouterr().err
    assert main(benchmark) == 0
    assert asked[4:] == [("paired", False), ("paired", True)]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert line.startswith(f"skipped, as {tmp_path / 'new' / 'out.json'} has their figures (of a card): ")
    assert line.endswith("shared ddp no not checkpointed, sdxl shared ddp no checkpointed")
    rows = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    assert [(row["layout"], row["gradient_checkpointing"]) for row in rows] == everything
    assert all("failed" not in row for row in rows)
    assert main(benchmark) == 0
    assert len(asked) == 6
    others = ["--lora-rank 4", "--steps 1", "--batch-size 3"]
    others += [f"--clip-reward-model {more}" for more in ("a", "b", f"b --tiny-vae {tmp_path}")]
    for more in others:
        assert main([*benchmark, *more.split()]) == 0, more
        assert asked[-4:] == everything
        del asked[-4:]
        assert len(asked) == 6
    assert len(json.loads((tmp_path / "new" / "out.json").read_text())["rows"]) == 7 * 4


def told_row(**more):
    row = Row("sdxl").told() | {
        "num_processes": 1, "batch_size": 4, "resolution": "1024", "sample_num_steps": 1, "ratio_update": 5, "rewards": 0,
    }  # fmt: skip
    return row | FIGURES | more


def test_a_table_tells_rows_apart_and_sets_ours_beside_the_published():
    ours, theirs = told_row(gradient_checkpointing=True), told_row(schedule="published", seconds_step=4.0)
    theirs["peak_memory_gib"] = 50.0
    lines = page.table([ours, theirs, told_row(batch_size=8, rewards=2)])
    assert (
        lines[0]
        == "model sdxl, layout shared, backend ddp, processes 1, format no, compile off, px 1024, N 1, R 5, device a card."
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0] == [
        "schedule", "checkpointing", "batch", "rewards", "s a step", "of published", "images/s", "outside network",
        "peak GiB", "of published", "TFLOP/s", "MFU",
    ]  # fmt: skip
    assert cells[2] == ["ours", "on", "4", "0", "2", "0.50", "10", "5%", "20.00", "0.40", "400", "40%"]
    assert cells[3][4:6] == ["4", ""]
    assert cells[4][:6] == ["ours", "off", "8", "2", "2", ""]  # there is no published row of these settings


def slow_row(config: object) -> dict[str, float]:
    if config == "sleeps":
        time.sleep(60)
    if config == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seconds": 1.0, "world": int(os.environ.get("WORLD_SIZE", "0"))}


@pytest.mark.slow
def test_a_row_has_processes_of_its_own_and_a_limit():
    assert fresh(slow_row, ("measures",), 1, 0) == {"seconds": 1.0, "world": 0}
    assert fresh(slow_row, ("measures",), 2, 0) == {"seconds": 1.0, "world": 2}
    assert fresh(slow_row, ("sleeps",), 1, 0.2) == {"failed": "not done within 0.2 s"}
    assert "ended" in fresh(slow_row, ("dies",), 1, 0)["failed"]


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image"])
def test_random_models_of_a_folder_s_shapes_take_a_step(name, tmp_path, prompts_file, monkeypatch):
    """As on a GPU at full size: nothing but shapes is read."""
    folder = save_flow(tmp_path / name, name)
    _, published = published_of(parse(["--pretrained-model", str(folder)]).run, None)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    monkeypatch.setitem(PUBLISHED, "sd3_medium", published)
    config = BenchmarkConfig(
        data_path_train=str(prompts_file), resolution="64", batch_size=2, ratio_update=2, lora_rank=2, steps=1,
        mixed_precision="no",
    )  # fmt: skip
    row = measure(config, Row("sd3_medium", "shared"))
    assert row["seconds_step"] > 0
    assert row["network_calls_step"] == 2 * (1 + 1) + 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--layouts shared,other", "--layouts other: unknown"),
        ("--part published --layouts shared", "--layouts does nothing with --part published"),
        ("--models sdxl", "--models: published sizes need a CUDA device"),
        ("--mixed-precision no,fp64", "--mixed-precision fp64: unknown"),
        ("--part published --mixed-precision no,bf16", "--mixed-precision no,bf16 with --part published"),
        ("--part published --schedules published", "--schedules does nothing with --part published"),
        ("--append --out /proc/cpuinfo", "--append: /proc/cpuinfo is no benchmark's JSON"),
        ("--part rewards", "--part rewards without a reward model"),
        ("--part rewards --layouts shared", "--layouts does nothing with --part rewards"),
        ("--part rewards --steps 2", "--steps does nothing with --part rewards"),
        ("--part rewards --ratio-update 2", "--ratio-update does nothing with --part rewards"),
        ("--resolution 30", "multiples of 8"),
        ("--data-path-train /nowhere", "cannot read /nowhere"),
        ("--out /proc/none/out.json", "--out /proc/none/out.json: cannot be written"),
    ],
)
def test_mistakes_are_one_line_before_a_model_loads(arguments, more, said, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("train_t2i.benchmark.step.fresh", lambda *_, **__: pytest.fail("measures"))
    assert main(["benchmark", *arguments, *more.split()]) in (2, 5)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_an_interrupted_benchmark_keeps_its_rows(arguments, in_this_process, tmp_path, monkeypatch):
    def once(config: BenchmarkConfig, row: Row):
        if row.checkpointing:
            raise KeyboardInterrupt
        return told_row()

    monkeypatch.setattr("train_t2i.benchmark.step.measure", once)
    with pytest.raises(KeyboardInterrupt):
        main(["benchmark", *arguments, *WHOLE_STEPS])
    (row,) = json.loads((tmp_path / "new" / "out.json").read_text())["rows"]
    assert row["seconds_step"] == 2


@pytest.mark.parametrize("small", ["0", "1"])
def test_no_row_of_the_gpu_script_is_refused(small, tmp_path):
    """Its programs print their arguments; each row that it asks for has settings, without a device."""
    script = Path(__file__).parent.parent / "scripts" / "benchmark_gpu.sh"
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "benchmark_gpu.md").touch()
    done = launched([str(script)], tmp_path, data=False, SMALL=small, WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    _, *calls = done.stdout.replace("\n", "\0").split("-m\0train_t2i\0benchmark\0")
    asked = [parse_verb(BenchmarkConfig, "benchmark", call.rstrip("\0").split("\0")) for call in calls]
    rows = [(config, row) for config in asked for row in combinations(config)]
    assert len(rows) == 8
    for config, row in rows:
        settings_of(config, row)  # raises UserError
        assert row.is_random == (small == "0")
    assert {config.batch_size for config, row in rows if row.layout == "paired"} == {4, 8}
    assert {row.schedule for _, row in rows} == {"ours", "published"}


@pytest.mark.slow
def test_the_gpu_script_ends_on_its_budget_and_tells_of_every_row(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "benchmark_gpu.sh"
    told = {"WORK": str(tmp_path), "SMALL": "1", "BUDGET_S": "60"}
    done = subprocess.run(["bash", str(script)], env={**os.environ, **told}, check=True, capture_output=True, text=True)
    rows = json.loads((tmp_path / "benchmark_gpu.json").read_text())["rows"]
    assert len(rows) == 8
    assert "seconds_step" in rows[0]  # the first has all of the budget
    assert all("seconds_step" in row or row["failed"].startswith("not done within") for row in rows)
    assert done.stdout.endswith((tmp_path / "benchmark_gpu.md").read_text())
    assert (tmp_path / "benchmark_gpu.png").stat().st_size > 0


@pytest.mark.slow
def test_the_script_measures_the_tiny_world(tmp_path):
    """Every row in a process of its own, models and prompts made by the script."""
    more = ["--layouts", "separate", "--steps", "1", "--batch-size", "1", "--ratio-update", "1"]
    script = Path(__file__).parent.parent / "scripts" / "benchmark.sh"
    subprocess.run(["bash", str(script), *more], env={**os.environ, "WORK": str(tmp_path)}, check=True)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["network_calls_step"] for row in rows] == [6, 6]
