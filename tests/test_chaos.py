"""The short version of ``scripts/chaos.sh``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_twenty_random_kills_and_no_bad_resume(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "chaos.py"), "--kills", "20", "--root", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["kills"] == 20
    assert result["bad"] == []
    assert result["where"]["in a save"] >= 5
    assert set(result["world size"]) == {"1", "2"}
