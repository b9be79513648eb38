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
    values = {key: [member[key] for member in members] for key in (*KEYS, "count")}
    mean = {key: mean_of(column) for key, column in values.items()}
    known = [key for key in KEYS if mean[key] is not None]
    deviation = {key: statistics.stdev(values[key]) for key in known} if len(members) > 1 else None
    return {"model": model, **mean, "seeds": len(members), "standard_deviation": deviation}


def mean_of(column: list) -> float | int | None:
    """Counts that agree stay whole numbers; what was not measured in every row has no mean."""
    if None in column:
        return None
    agree = all(isinstance(value, int) and value == column[0] for value in column)
    return column[0] if agree else statistics.fmean(column)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(mean_rows(json.loads(source.read_text())), indent=1) + "\n")
