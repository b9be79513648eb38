"""``python -m train_t2i report RUN...``: one HTML page that needs nothing else, and its plots as PNG files.

    OUT/index.html     stages, evaluation tables, sample timeline, curves, settings
    OUT/plots/*.png    rewards, losses, gradients, speed: those that the runs have

Several runs are stages of one story: their curves follow each other on one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_t2i.cli import parse_verb
from train_t2i.config import flag
from train_t2i.errors import EXIT_DONE, UserError
from train_t2i.evaluation.table import read_table
from train_t2i.report_data import read_run


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page and PNG plots of runs: curves, sample timeline, settings, evaluation tables."""

    runs: tuple[str, ...] = flag((), "run folder, OUTPUT_DIR/EXP_NAME (may stand without the flag); in order")
    table: tuple[str, ...] = flag((), "evaluation table to show (JSON of the verb evaluate); may be repeated")
    out: str = flag("report", "folder to write")
    title: str = flag("Training report", "heading of the page")
    max_sheets: int = flag(8, "sample sheets shown of a run; the first and the last always", low=1)


def main(arguments: Sequence[str]) -> int:
    config = parse_verb(ReportConfig, "report", arguments)
    if not config.runs:
        raise UserError("no run to report on", "give run folders, OUTPUT_DIR/EXP_NAME")
    from train_t2i.report_page import Table, page
    from train_t2i.report_plots import draw_all
    from train_t2i.storage import write_atomically

    for path in config.table:
        if not Path(path).is_file():
            raise UserError(f"--table {path}: no such file", "python -m train_t2i evaluate --out writes one")
    tables = [Table(Path(path).stem, tuple(read_table(path, "--table"))) for path in config.table]
    runs = [read_run(path) for path in config.runs]
    out = Path(config.out)
    try:
        plots = draw_all(runs, out / "plots")
        write_atomically(out / "index.html", page(config.title, runs, plots, tables, config.max_sheets))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}", "choose another folder, or free the disk") from None
    print(out / "index.html")
    return EXIT_DONE
