"""What scripts/methods.sh reckons with: the steps that fit into a cell's time, and the table of all cells.

python scripts/cells.py steps PROBE_RUN SECONDS    how many steps a run like this one takes in so many seconds
python scripts/cells.py table WORK                 WORK/table-FAMILY.json, as `evaluate` wrote them, with what each model cost
                                                   -> WORK/table.json and WORK/table.md
"""

import json
import sys
from pathlib import Path

from train_t2i.report_data import LOGS, read_lines, read_run

WARM_UP_STEPS = 2  # of a probe: they are slower
COLUMNS = {  # of table.md: key of a row -> (heading, format)
    "model": ("model", "{}"),
    "network_calls": ("calls", "{}"),
    "adherence": ("adherence", "{:.3f}"),
    "clip": ("CLIP", "{:.3f}"),
    "hps": ("HPS", "{:.3f}"),
    "held_out": ("held-out tower", "{:.3f}"),
    "frechet": ("Fréchet", "{:.4f}"),
    "recall": ("recall", "{:.3f}"),
    "training_seconds": ("training s", "{:.0f}"),
    "prompts_seen": ("prompts seen", "{:,}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
}


def steps_that_fit(probe: Path, seconds: float) -> int:
    """From the mean time of the probe's steps, with the ticks between them that update the guidance network alone."""
    by_tick: dict[int, float] = {}
    for name in LOGS.values():
        lines, _ = read_lines(probe / "loss_logs" / name)
        by_tick |= {line["tick"]: float(line["seconds_tick"]) for line in lines}
    ends = [line["tick"] for line in read_lines(probe / "loss_logs" / LOGS["gen"])[0]]
    warm, counted = ends[WARM_UP_STEPS - 1], len(ends) - WARM_UP_STEPS
    return int(seconds * counted / sum(took for tick, took in by_tick.items() if tick > warm))


def with_cost(row: dict, work: Path) -> dict:
    """A row and what all stages of its model cost.  ``cells/MODEL`` says (runs, seconds of work before them)."""
    note = work / "cells" / f"{row['model']}.json"
    if not note.is_file():  # a teacher
        return row
    told = json.loads(note.read_text())
    stories = [read_run(str(work / run)) for run in told["runs"]]
    return row | {
        "training_seconds": told["seconds_before"] + sum(story.seconds for story in stories),
        "prompts_seen": stories[-1].samples_seen,  # a stage counts on from the one before
        "peak_memory_gib": max(story.peak_memory_gib for story in stories),
    }


def markdown(rows: list[dict]) -> str:
    def cell(row: dict, key: str, form: str) -> str:
        return form.format(row[key]) if row.get(key) is not None else "-"

    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    lines += [[cell(row, key, form) for key, (_, form) in COLUMNS.items()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(verb: str, *arguments: str) -> None:
    if verb == "steps":
        print(steps_that_fit(Path(arguments[0]), float(arguments[1])))
        return
    work = Path(arguments[0])
    tables = (path for path in sorted(work.glob("table-*.json")) if path.suffixes == [".json"])  # no .paired.json
    rows = [with_cost(row, work) for table in tables for row in json.loads(table.read_text())]
    (work / "table.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / "table.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
