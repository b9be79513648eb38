"""The reckoning of scripts/methods.sh, on logs and tables written here by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

CELLS = runpy.run_path(str(Path(__file__).resolve().parent.parent / "scripts" / "cells.py"))


def a_run(root: Path, seconds: dict[int, float]) -> Path:
    """One whose every other tick is a generator's; a tick -> its seconds."""
    logs = root / "loss_logs"
    logs.mkdir(parents=True)
    (root / "args.json").write_text("{}")
    for name, mine in (("gen", True), ("gui", False)):
        lines = [
            {"tick": tick, "step": tick // 2, "seconds_tick": took, "samples_seen": 32 * tick, "peak_memory_gib": 1 + tick / 10}
            for tick, took in seconds.items() if (tick % 2 == 0) is mine
        ]  # fmt: skip
        (logs / f"loss_{name}_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_the_steps_that_fit_leave_the_first_two_out(tmp_path: Path) -> None:
    probe = a_run(tmp_path / "probe", {1: 90, 2: 90, 3: 90, 4: 90, 5: 1, 6: 3, 7: 1, 8: 3})
    assert CELLS["steps_that_fit"](probe, 103.0) == 25  # of 4 s, guidance's ticks included


def test_a_model_costs_all_its_stages_and_a_teacher_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "cold", {1: 1, 2: 3})
    a_run(tmp_path / "rewards", {3: 2, 4: 6})
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "student.json").write_text('{"runs": ["cold", "rewards"], "seconds_before": 100}')
    rows = [{"model": "teacher", "adherence": 0.9}, {"model": "student", "adherence": 0.8765}]
    (tmp_path / "table-flux.json").write_text(json.dumps(rows))
    (tmp_path / "table-flux.paired.json").write_text('{"scored": [], "pairs": []}')  # `evaluate` writes one beside each
    CELLS["main"]("table", str(tmp_path))
    teacher, student = json.loads((tmp_path / "table.json").read_text())
    assert teacher == rows[0]
    assert (student["training_seconds"], student["prompts_seen"]) == (112.0, 128)
    assert student["peak_memory_gib"] == pytest.approx(1.4)
    *_, first, last = capsys.readouterr().out.splitlines()
    assert first.split(" | ")[2:4] == ["0.900", "-"]
    assert last == "| student | - | 0.876 | - | - | - | - | - | 112 | 128 | 1.40 |"
