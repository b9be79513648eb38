"""Compiled blocks where processes share out weights, gradients or optimizer states: the plain run's, on the same backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_runs
from flow_models import save_flow
from launched import Plan, launch
from test_distributed import close_logs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
COMMON = "--use-lora-gen --gradient-checkpointing --sample-num-steps 2 --text-length 24 --adam-epsilon 1e-2"


@pytest.fixture(scope="module", params=["fsdp2", "zero2", "zero3"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Path:
    """Runs of two processes: plain, compiled, and compiled until its first step and gone on with."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp(request.param)
    model = save_flow(root / "sd3", "sd3")

    def plan(name: str, more: str = "", fault: str = "compiled") -> Plan:
        compiled = "--compile blocks" if fault == "compiled" else ""
        flags = f"{COMMON} --backend {request.param} {compiled} {more}"
        return Plan(name, tiny_runs.arguments(root, name, flags, model=model, prompts=prompts_file), fault)

    resumed = plan("resumed", "--auto-resume")
    first = Plan("first", plan("resumed", "--max-train-steps 1").arguments, "compiled")
    plans = [plan("plain", fault="none"), plan("whole")]
    if request.param == "fsdp2":  # each run compiles anew, on ZeRO stage 3 for a minute
        plans += [first, resumed]
    reports = launch(root, 2, plans)
    assert [report["codes"] for report in reports] == [{plan.name: 0 for plan in plans}] * 2
    return root


def test_a_compiled_run_is_the_plain_one_up_to_rounding(root: Path) -> None:
    """Nothing is compiled after the first step: the launch would have failed."""
    before, plain = (tiny_runs.weights(root / "plain", step) for step in (1, 2))
    fast = tiny_runs.weights(root / "whole", 2)
    moved = max(float((plain[key] - before[key]).abs().max()) for key in plain)
    assert moved > 0
    assert max(float((plain[key] - fast[key]).abs().max()) for key in plain) < 1e-3 * moved
    for role in ("generator", "guidance"):
        close_logs(tiny.log_lines(root / "whole", role), tiny.log_lines(root / "plain", role))


def test_a_compiled_run_resumes_bit_for_bit(root: Path) -> None:
    if not (root / "resumed").exists():
        pytest.skip("one backend is enough: what is saved does not depend on it")
    tiny.assert_same_checkpoint(root / "whole", root / "resumed", 2)
