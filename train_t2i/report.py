"""``python -m train_t2i report RUN...``: one HTML page that needs nothing else, and its plots as files.

    OUT/index.html        stages, evaluation tables, sample timeline, curves, reward guard, cost, environment, settings
    OUT/plots/*.png, .pdf rewards, losses, gradients, speed: those that the runs have

Several runs are stages of one story: their curves follow each other on one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DONE, UserError
from train_t2i.evaluation.table import read_given_table
from train_t2i.report_data import read_run


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page and plots of runs: curves, sample timeline, evaluation tables, cost, environment, settings."""

    runs: tuple[str, ...] = flag((), "run folder, OUTPUT_DIR/EXP_NAME (may stand without the flag); in order")
    table: tuple[str, ...] = flag((), "evaluation table to show (JSON of the verb evaluate); may be repeated")
    out: str = flag("report", "folder to write")
    title: str = flag("Training report", "heading of the page")
    max_sheets: int = flag(8, "sample sheets shown of a run; the first and the last always", low=1)
    smoothing: float = flag(0.04, "share of a curve's points that its running mean is over; 0: none", low=0, high=1)


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(ReportConfig, "report", arguments)
    if not config.runs:
        raise UserError("no run to report on", "give run folders, OUTPUT_DIR/EXP_NAME")
    from train_t2i.report_page import page
    from train_t2i.report_plots import draw_all
    from train_t2i.report_tables import Table
    from train_t2i.storage import write_atomically

    tables = [Table(Path(path).stem, tuple(read_given_table(path))) for path in config.table]
    runs = [read_run(path) for path in config.runs]
    out = Path(config.out)
    try:
        plots = draw_all(runs, out / "plots", config.smoothing)
        write_atomically(
            out / "index.html", page(config.title, runs, plots, tables, config.max_sheets, config.smoothing)
        )
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}", "choose another folder, or free the disk") from None
    print(out / "index.html")
    return EXIT_DONE
