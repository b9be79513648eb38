"""Two processes on the CPU (gloo, by torchrun) against one: one launch, several runs in it.

Run as a program this file is what each of the two processes executes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer import Trainer, flags_of

COMMON = "--max-train-steps 2 --checkpoint-steps 1 --adam-epsilon 1e-2 --sample-steps 2"
CASES = {
    # name: (method, flags of two processes, flags of one process with the same global batch)
    "shared": ("dmdr", "--use-lora-gen --cold-start-iter 1 {rewards} --batch-size 2", "--batch-size 4"),
    "paired": (
        "dmdr",
        "--batch-size 1 --gradient-accumulation-steps 2",
        "--batch-size 4 --gradient-accumulation-steps 1",
    ),
    "sft": ("sft", "--batch-size 2", "--batch-size 4"),
    "skips": ("dmdr", "--batch-size 2", "--batch-size 4"),
    "stopped": ("dmdr", "--batch-size 2", "--batch-size 4"),
}


# -- what each process does ------------------------------------------------------------------------------------------


def watch_writes(root: str, found: list[str]) -> None:
    """Keep everything that this process makes, opens for writing, moves or removes below ``root``."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | os.PathLike) and str(path).startswith(root):
                found.append(f"open {path}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(root):
            found.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def poisoned(dmd: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """The loss, not a number in the first update of process 1."""
    updates = iter(range(100))

    def loss(*arguments: Any) -> Any:
        bad = (rank, next(updates)) == (1, 0)
        return dmd(*arguments) * (float("nan") if bad else 1.0)

    return loss


def child(plan_file: str) -> None:
    import torch

    torch.set_num_threads(1)
    from train_t2i import engine, losses, train
    from train_t2i.__main__ import main

    plan: dict[str, Any] = json.loads(Path(plan_file).read_text())
    rank, written, codes = int(os.environ["RANK"]), [], {}
    engine.Engine.close = lambda self: None  # the processes stay together for the next run
    if rank == 1:
        watch_writes(plan["root"], written)
    dmd, flush, find = losses.dmd, train.log.RunLog.flush, train.find_checkpoint
    for name, arguments in plan["runs"]:
        if name == "skips":
            losses.dmd = poisoned(dmd, rank)
        elif name == "stopped":

            def interrupted(self, tick: int, *rest: Any) -> None:
                flush(self, tick, *rest)
                if rank == 1 and tick == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

            train.log.RunLog.flush = interrupted
        elif name == "divided" and rank == 1:
            train.find_checkpoint = lambda cfg, folder: None
        codes[name] = main(arguments)
        losses.dmd, train.log.RunLog.flush, train.find_checkpoint = dmd, flush, find
    state = engine.PartialState()
    result = {"codes": codes, "written": written, "world": state.num_processes, "backend": state.backend}
    Path(f"{plan_file}.{rank}").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder, towers):
    """(folder of runs, arguments of a run by name, what each process reported)."""
    root = tmp_path_factory.mktemp("distributed")
    flags = flags_of(root, sdxl_folder, tiny_vae_folder, prompts_file, images_table, pairs_folder)
    trainer = Trainer(root, flags, lambda: ("", ""))
    rewards = f"--clip-reward-model {towers['clip']} --reward-margin 2"

    def arguments(case: str, name: str, alone: bool = False, more: str = "") -> list[str]:
        method, two, one = CASES[case]
        steps = "--sample-num-steps 2" if method == "dmdr" else ""
        flags = f"{COMMON} {steps} {two.format(rewards=rewards)} {one if alone else ''} {more}"
        return trainer.arguments(name, flags, method)

    runs = [(name, arguments(name, name)) for name in CASES]
    runs.append(("short", arguments("shared", "resumed", more="--max-train-steps 1")))
    runs.append(("resumed", arguments("shared", "resumed", more="--auto-resume")))
    runs.append(("divided", arguments("shared", "resumed", more="--auto-resume --max-train-steps 3")))
    plan = root / "plan.json"
    plan.write_text(json.dumps({"root": str(root), "runs": runs}))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(plan),
    ]
    repository = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": repository}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, arguments, [json.loads(Path(f"{plan}.{rank}").read_text()) for rank in range(2)]


def test_two_processes_ran(launched):
    _, _, reports = launched
    for report in reports:
        assert report["world"] == 2
        assert report["backend"] == "gloo"
        expected = dict.fromkeys((*CASES, "short", "resumed"), 0) | {"stopped": 75, "divided": 2}
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


@pytest.mark.parametrize("case", ["shared", "paired", "sft"])
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
    for role in ("generator", "guidance"):
        if tiny.log_lines(one, role):
            close_logs(tiny.log_lines(run, role), tiny.log_lines(one, role))
    assert json.loads((run / "args.json").read_text())["method"] == CASES[case][0]


def test_one_process_that_is_not_finite_makes_all_skip(launched):
    import tiny

    run = launched[0] / "skips"
    assert [line["skipped"] for line in tiny.log_lines(run)] == [1, 0]
    assert tiny.log_lines(run)[0]["loss"] is None
    files = [dict(tiny.checkpoint_files(run, step)) for step in (1, 2)]
    assert not files[0]["accelerator_1/optimizer.safetensors"]  # nothing was stepped
    assert files[1]["accelerator_1/optimizer.safetensors"]


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


def test_processes_that_find_different_checkpoints_train_nothing(launched):
    """As on machines without a common disk, where only the first has saved; the exit code is 2, see above."""
    from train_t2i.checkpoint import RunFolder

    assert RunFolder(launched[0] / "resumed").steps() == [2, 1]


def test_a_launch_of_another_size_is_refused(launched, capsys):
    from train_t2i.__main__ import main

    _, arguments, _ = launched
    assert main(arguments("shared", "shared", more="--auto-resume")) == 2
    assert "made by 2 processes, this launch has 1" in capsys.readouterr().err


if __name__ == "__main__":
    child(sys.argv[1])
