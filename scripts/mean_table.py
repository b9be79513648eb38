"""Rows of several training seeds (MODEL-seedN) -> one row a model: the mean, and the standard deviation over seeds.

python scripts/mean_table.py EVALUATIONS.json TABLE.json
"""

import json
import re
import statistics
import sys
from pathlib import Path

KEYS = ("network_calls", "adherence", "clip", "hps", "held_out", "frechet", "recall", "ms_per_image")


def mean_rows(rows: list[dict]) -> list[dict]:
    """In the order in which the models first appear."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"-seed\d+$", "", row["model"]), []).append(row)
    return [mean_row(model, members) for model, members in groups.items()]


def mean_row(model: str, members: list[dict]) -> dict:
    mean = {key: statistics.fmean(member[key] for member in members) for key in KEYS}
    deviation = {key: statistics.stdev(m[key] for m in members) for key in KEYS} if len(members) > 1 else None
    return {"model": model, **mean, "seeds": len(members), "standard_deviation": deviation}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(mean_rows(json.loads(source.read_text())), indent=1) + "\n")
