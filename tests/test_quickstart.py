"""The quickstart, shrunk: every stage really runs, the table has its columns, a second run does nothing again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("network_calls", "adherence", "clip", "hps", "held_out", "frechet", "recall", "ms_per_image")


def quickstart(work: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"QUICK": "1", "WORK": str(work), "VIRTUAL_ENV": sys.prefix}
    script = ROOT / "scripts" / "quickstart.sh"
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_from_pairs_to_report(tmp_path: Path) -> None:
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["model"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert list(rows) == ["teacher", "ode-1", "cold-1", "dmdr-1"]
    assert all(math.isfinite(row[key]) for row in rows.values() for key in COLUMNS)
    assert rows["teacher"]["network_calls"] == 50
    assert {rows[name]["network_calls"] for name in ("ode-1", "cold-1", "dmdr-1")} == {1}
    assert rows["teacher"]["adherence"] > 0.85
    page = (tmp_path / "report" / "index.html").read_text()
    assert "dmdr-1" in page
    again = quickstart(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("already done") == 10
