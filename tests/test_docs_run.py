"""Every command block of README.md and docs/*.md is run, in its tiny form: tiny_docs.py says what that is, and what is not run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import ROOT, blocks, commands
from reader import Desk, reason, replaced, tiny
from tiny_docs import NOT_RUN, STANDS_FOR

from rewards.random_weights import write
from shapes import edits, scenes

BLOCKS = list(blocks())
GENEVAL = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
VOTE = {"row": 0, "prompt": "p", "left": "a", "right": "b", "choice": "left", "blind": True}


def lay_out(folder: Path) -> None:
    """What the pages take for granted that their readers have."""
    for program, words in (
        (scenes, f"prompts --split train --count 8 --out {folder}/runs/prompts.txt"),
        (scenes, f"render --split train --count 8 --out {folder}/runs/images"),
        (edits, f"render --split train --count 8 --out {folder}/runs/edits"),
    ):
        program.main(words.split())
    shutil.copytree(folder / "runs/images", folder / "real")
    for file in sorted((folder / "real").glob("*.png"))[:4]:
        shutil.copy(file, folder)
    lines = (folder / "runs/prompts.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(lines[:4]) + "\n")
    (folder / "benchmark").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps(lines[:2]))
    (folder / "evaluation_metadata.jsonl").write_text(json.dumps(GENEVAL) + "\n")
    votes = {"format": "train_t2i votes", "sheet": "s", "models": ["a", "b"], "votes": [VOTE]}
    (folder / "votes.json").write_text(json.dumps(votes))
    (folder / "table.json").write_text(json.dumps([{"model": "a", "clip": 0.5, "count": 2}]))
    write("pickscore", folder / "PickScore_v1")
    (folder / "my_rewards.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """What all blocks find: files, and runs of earlier stages once somebody needs them."""
    desk = Desk(tmp_path_factory.mktemp("shared"))
    lay_out(desk.folder)
    desk.run_all("python -m train_t2i pairs --data-path-train prompts.txt --out runs/pairs --count 4")
    return desk


@pytest.fixture
def desk(shared: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.syspath_prepend(tmp_path / "desk")
    return Desk(tmp_path / "desk", shared)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if not all(map(reason, commands(tiny(b.values[0]))))])
def test_a_documented_block_runs(block: str, desk: Desk) -> None:
    desk.run_all(block)


# -- the tables ------------------------------------------------------------------------------------------------------


def test_every_row_stands_for_words_of_a_page() -> None:
    for said in STANDS_FOR:
        assert any(replaced(block.values[0], said) != block.values[0] for block in BLOCKS), said


def test_what_is_not_run_is_documented_and_its_reason_names_tests_that_are_there() -> None:
    found = {reason(command) for block in BLOCKS for command in commands(block.values[0])}
    assert found - {None} == NOT_RUN.keys()
    named = re.findall(r"tests/\S+\.py", " ".join(NOT_RUN.values()))
    assert named
    assert all((ROOT / name).is_file() for name in named)
