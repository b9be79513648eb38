"""The benchmark: one tiny row as its JSON tells it, and what is refused before a model loads."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from reward_towers import write_folder

from train_t2i.__main__ import main
from train_t2i.benchmark import BenchmarkConfig


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

    class Here:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, call, *given):
            value = call(*given)
            return type("Done", (), {"result": staticmethod(lambda: value)})

    monkeypatch.setattr("train_t2i.benchmark.step.ProcessPoolExecutor", Here)


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
    more = ["--part", "published", "--batch-size", "3", "--sample-num-steps", "2"]
    assert main(["benchmark", *arguments, *WHOLE_STEPS, *more]) == 0
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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--layouts shared,other", "--layouts other: unknown"),
        ("--size sdxl", "--size sdxl needs a CUDA device"),
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
    monkeypatch.setattr("train_t2i.benchmark.step.ProcessPoolExecutor", lambda *_, **__: pytest.fail("measures"))
    assert main(["benchmark", *arguments, *more.split()]) in (2, 5)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_an_interrupted_benchmark_keeps_its_rows(arguments, in_this_process, tmp_path, monkeypatch):
    def once(config: BenchmarkConfig, layout: str, checkpointing: bool):
        if checkpointing:
            raise KeyboardInterrupt
        return {"layout": layout}

    monkeypatch.setattr("train_t2i.benchmark.step.measure", once)
    with pytest.raises(KeyboardInterrupt):
        main(["benchmark", *arguments, *WHOLE_STEPS])
    assert json.loads((tmp_path / "new" / "out.json").read_text())["rows"] == [{"layout": "shared"}]


@pytest.mark.slow
def test_the_script_measures_the_tiny_world(tmp_path):
    """Every row in a process of its own, models and prompts made by the script."""
    more = ["--layouts", "separate", "--steps", "1", "--batch-size", "1", "--ratio-update", "1"]
    script = Path(__file__).parent.parent / "scripts" / "benchmark.sh"
    subprocess.run(["bash", str(script), *more], env={**os.environ, "WORK": str(tmp_path)}, check=True)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["network_calls_step"] for row in rows] == [6, 6]
