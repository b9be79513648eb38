"""Two processes on the CPU against one: data parallelism, and what all processes agree on whatever the backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launched import Plan, launch
from trainer import Trainer, flags_of

COMMON = "--max-train-steps 2 --checkpoint-steps 1 --adam-epsilon 1e-2 --sample-steps 2"
CASES = {
    # name: (method, flags of two processes, flags of one process with the same global batch, what is done to it)
    "shared": ("dmdr", "--use-lora-gen --cold-start-iter 1 {rewards} --batch-size 2", "--batch-size 4", "none"),
    "paired": (
        "dmdr",
        "--batch-size 1 --gradient-accumulation-steps 2",
        "--batch-size 4 --gradient-accumulation-steps 1",
        "none",
    ),
    "sft": ("sft", "--batch-size 2", "--batch-size 4", "none"),
    "guarded": (
        "dmdr",
        "{watched} --cold-start-iter 0 --reward-guard scale --sample-steps 1 --max-train-steps 3 --batch-size 1",
        "--batch-size 2",
        "none",
    ),
    "skips": ("dmdr", "--batch-size 2", "--batch-size 4", "not_finite"),
    "stopped": ("dmdr", "--batch-size 2", "--batch-size 4", "signal"),
}


SCALED = ("scaled", "scaled-short", "scaled-resumed")


@pytest.fixture(scope="module")
def launched(tmp_path_factory, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder, towers):
    """(folder of runs, arguments of a run by name, what each process reported)."""
    root = tmp_path_factory.mktemp("distributed")
    flags = flags_of(root, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder)
    trainer = Trainer(root, flags, lambda: ("", ""))
    rewards = f"--clip-reward-model {towers['clip']} --reward-margin 2"
    watched = (
        "--extra-rewards 30*shapes.bait:saturation --extra-reward-margin 2 --dmd-weight 1e-3 "
        f"--monitor-rewards clip={towers['clip']} --guard-reward-drop 0 --guard-diversity-drop 0"
    )

    def arguments(case: str, name: str, alone: bool = False, more: str = "") -> list[str]:
        method, two, one, _ = CASES[case]
        steps = "--sample-num-steps 2" if method == "dmdr" else ""
        flags = f"{COMMON} {steps} {two.format(rewards=rewards, watched=watched)} {one if alone else ''} {more}"
        return trainer.arguments(name, flags, method)

    plans = [Plan(name, arguments(name, name), fault) for name, (*_, fault) in CASES.items()]
    plans.append(Plan("short", arguments("shared", "resumed", more="--max-train-steps 1")))
    plans.append(Plan("resumed", arguments("shared", "resumed", more="--auto-resume")))
    eager = "--learning-rate-gen 5e-2 --adam-epsilon 1e-8 --max-train-steps 4"  # a game at the second step, and lasting
    for name, more in zip(SCALED, ("", "--max-train-steps 2", "--auto-resume"), strict=True):
        run = name.replace("short", "resumed")
        plans.append(Plan(name, arguments("guarded", run, more=f"{eager} {more}")))
    plans.append(Plan("gamed", arguments("guarded", "gamed", more=f"{eager} --reward-guard stop")))
    late = arguments("shared", "resumed", more="--auto-resume --max-train-steps 3")
    plans.append(Plan("divided", late, "no_common_disk"))
    return root, arguments, launch(root, 2, plans)


def test_two_processes_ran(launched):
    _, _, reports = launched
    for report in reports:
        assert report["world"] == 2
        assert report["backend"] == "gloo"
        expected = dict.fromkeys((*CASES, "short", "resumed", *SCALED), 0)
        expected |= {"stopped": 75, "gamed": 9, "divided": 2}
        assert report["codes"] == expected


def test_only_the_first_writes(launched):
    _, _, reports = launched
    assert reports[1]["written"] == []


def close_logs(mine: list[dict], other: list[dict]) -> None:
    assert len(mine) == len(other) > 0
    for line, expected in zip(mine, other, strict=True):
        assert line.keys() == expected.keys()
        for name, value in line.items():
            assert (value is None) == (expected[name] is None), name
            assert value is None or value == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name


def alone(launched, case: str) -> Path:
    """The same run in this one process."""
    from train_t2i.__main__ import main

    root, arguments, _ = launched
    assert main(arguments(case, f"{case}-alone", alone=True)) == 0
    return root / f"{case}-alone"


@pytest.mark.parametrize("case", ["shared", "paired", "sft", "guarded"])
def test_two_processes_are_one_with_the_same_global_batch(launched, case):
    """Weights and logs, which are averaged over the processes; Adam's epsilon is large enough to carry rounding as it is."""
    import tiny
    import torch

    run, one = launched[0] / case, alone(launched, case)
    mine, other = dict(tiny.checkpoint_files(run, 2)), dict(tiny.checkpoint_files(one, 2))
    start = dict(tiny.checkpoint_files(one, 1))
    compared = [name for name in mine if name.endswith("model.safetensors")]
    assert len(compared) >= (1 if case == "sft" else 2)
    for name in compared:
        moved = max(float((other[name][key] - start[name][key]).abs().max()) for key in other[name])
        apart = max(float((other[name][key] - mine[name][key]).abs().max()) for key in other[name])
        assert moved > 1e-4
        assert apart < 0.02 * moved, name
        assert all(torch.isfinite(value).all() for value in mine[name].values())
    for role in ("generator", "guidance", "monitor"):
        if tiny.log_lines(one, role):
            close_logs(tiny.log_lines(run, role), tiny.log_lines(one, role))
    assert json.loads((run / "args.json").read_text())["method"] == CASES[case][0]


def test_one_process_that_is_not_finite_makes_all_skip(launched):
    import tiny

    run = launched[0] / "skips"
    assert [line["skipped"] for line in tiny.log_lines(run)] == [1, 0]
    assert tiny.log_lines(run)[0]["loss"] is None
    files = [dict(tiny.checkpoint_files(run, step)) for step in (1, 2)]
    first, second = (each["accelerator_1/optimizer.safetensors"].values() for each in files)
    assert not any(moment.any() for moment in first)  # nothing was stepped
    assert any(moment.any() for moment in second)


def test_a_signal_to_one_process_stops_all_at_the_step_boundary(launched):
    import tiny

    from train_t2i.checkpoint import RunFolder

    run = launched[0] / "stopped"
    assert RunFolder(run).steps() == [1]
    assert [line["tick"] for line in tiny.log_lines(run, "guidance")] == [1, 2]


def test_resuming_two_processes_is_exact(launched):
    import tiny

    tiny.assert_same_checkpoint(launched[0] / "shared", launched[0] / "resumed", 2)
    tiny.assert_same_logs(launched[0] / "shared", launched[0] / "resumed")


def test_what_the_main_process_reads_all_act_on_and_go_on_with(launched):
    """Rewards are scaled on both processes alike, before the stop and after it."""
    import tiny

    run, resumed = launched[0] / "scaled", launched[0] / "scaled-resumed"
    tiny.assert_same_checkpoint(run, resumed, 4)
    tiny.assert_same_logs(run, resumed)
    scales = [line["guard_scale"] for line in tiny.log_lines(run, "monitor")]
    assert scales == [1, 1, 1, 0.5, 0.25]


def test_processes_that_find_different_checkpoints_train_nothing(launched):
    """As on machines without a common disk, where only the first has saved; the exit code is 2, see above."""
    from train_t2i.checkpoint import RunFolder

    assert RunFolder(launched[0] / "resumed").steps() == [2, 1]
