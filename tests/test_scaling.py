"""docs/performance.md, "Scaling on paper": every figure of its tables is what plan says today."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from train_t2i.plan import parse_plan, rehearsed
from train_t2i.plan.estimate import GB
from train_t2i.plan.floor import CARDS, Floor, floor, least_seconds
from train_t2i.plan.model import published_of
from train_t2i.plan.page import tera
from train_t2i.plan.traffic import WORLDS, traffic

DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
SECTION = DOCS.read_text(encoding="utf-8").partition("## Scaling on paper\n")[2].partition("\n## ")[0]
BACKENDS = ("ddp", "zero2", "fsdp2", "zero3")


def common() -> str:
    """The flags that all rows share: those of the section's own command."""
    block = re.search(r"```bash\npython -m train_t2i plan (.*?)\n```", SECTION, re.DOTALL)
    assert block
    return re.sub(r"--model \S+ --layout \S+( --use-lora-gen)?", "", block[1].replace("\\\n", " "))


def tables() -> list[list[list[str]]]:
    """Cells of each table, without its head."""
    blocks = re.findall(r"(?:^\|.*\n)+", SECTION, re.MULTILINE)
    return [[[c.strip() for c in line.split("|")[1:-1]] for line in block.splitlines()[2:]] for block in blocks]


@lru_cache
def planned(flags: str) -> tuple[Floor, dict[str, list[float]]]:
    """(the floor, backend -> GB that a process sends in a step of each of WORLDS)."""
    config, settings = parse_plan(shlex.split(f"{common()} {flags}"))
    _, published = published_of(settings.run, config.model)
    run = replace(settings.run, model_family=published.family)
    found = rehearsed(replace(settings, run=run), published, 1)
    sent = {name: [traffic(run, found, name, n).sent(n) / GB for n in WORLDS] for name in BACKENDS}
    return floor(run, found, 1), sent


def computed(flags: str) -> list[str]:
    """A row of the first table."""
    least, _ = planned(flags)
    return [
        tera(sum(least.network.values())), tera(least.again), f"{least.read / GB:.0f}", f"{least.updated / GB:.0f}",
        f"{least_seconds(least, CARDS['H100']):.2g}",
    ]  # fmt: skip


def sent(flags: str, backend: str) -> list[str]:
    """A row of the second."""
    return [f"{float(f'{n:.3g}'):g}" for n in planned(flags)[1][backend]]


ROWS = [row[0].strip("`") for row in tables()[0]] if tables() else []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flags", ROWS)
def test_the_docs_say_what_plan_says(flags: str) -> None:
    computation, communication = tables()
    assert [row[1:] for row in computation if row[0].strip("`") == flags] == [computed(flags)]
    for row in communication:
        if row[0].strip("`") == flags:
            assert row[2:] == sent(flags, row[1])


def test_every_row_of_what_is_sent_has_been_counted() -> None:
    computation, communication = tables()
    assert len(ROWS) == len(set(ROWS)) >= 6
    assert {row[0] for row in communication} <= {row[0] for row in computation}
    assert {row[1] for row in communication} == set(BACKENDS)
