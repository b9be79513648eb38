"""Edits of the embedded world: instructions that say everything, pictures that differ where they should, an oracle that sees both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shapes import edits, scenes
from shapes.edit_oracle import edit_adherence, untouched
from shapes.edit_pictures import draw, pictures
from shapes.oracle import read

CIRCLE, SQUARE = scenes.Thing("small", "red", "circle"), scenes.Thing("large", "blue", "square")
ONE = scenes.Scene((CIRCLE,), "grey", position="left")
OTHER = scenes.Scene((SQUARE,), "navy", position="top")
TWO = scenes.Scene((CIRCLE, SQUARE), "grey", relation="left of")
EACH = 20  # edits of a kind


def tensor(pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def drawn():
    """(edits, source pictures, target pictures) of every kind, held out."""
    made = [draw("heldout", 5, index, (kind,)) for kind in edits.KINDS for index in range(EACH)]
    sources = [[tensor(source) for source in shown] for _, shown, _ in made]
    return [edit for edit, _, _ in made], sources, torch.stack([tensor(target) for _, _, target in made])


# ------------------------------------------------------------------ instructions
@pytest.mark.parametrize(
    ("instruction", "sources", "target"),
    [
        ("make the circle blue", (ONE,), "a small blue circle on the left on a grey background"),
        ("Paint the object green.", (ONE,), "a small green circle on the left on a grey background"),
        ("make the red circle large", (ONE,), "a large red circle on the left on a grey background"),
        ("turn the circle into a cross", (ONE,), "a small red cross on the left on a grey background"),
        ("make the background navy", (ONE,), "a small red circle on the left on a navy background"),
        ("move the red circle to the top", (ONE,), "a small red circle at the top on a grey background"),
        ("change the colour of the square to green", (TWO,),
         "a small red circle to the left of a large green square on a grey background"),
        ("swap the circle and the blue square", (TWO,),
         "a large blue square to the left of a small red circle on a grey background"),
        ("put the object of picture 2 above the circle of picture 1 on the background of picture 1", (ONE, OTHER),
         "a large blue square above a small red circle on a grey background"),
        ("on the background of picture 1, show the circle of picture 1 to the right of the object of picture 2",
         (ONE, OTHER), "a large blue square to the left of a small red circle on a grey background"),
    ],
)  # fmt: skip
def test_an_instruction_changes_what_it_names(instruction, sources, target):
    assert edits.follow(instruction, sources) == scenes.parse(target)


@pytest.mark.parametrize(
    ("instruction", "sources", "message"),
    [
        ("make the dog blue", (ONE,), "not an edit instruction"),
        ("a small red circle on the left on a grey background", (ONE,), "not an edit instruction"),
        ("make the cross blue", (ONE,), "0 objects of the source are 'the cross'"),
        ("make the object blue", (TWO,), "2 objects of the source are 'the object'"),
        ("move the circle to the left", (TWO,), "when it is alone"),
        ("swap the circle and the red circle", (TWO,), "two different objects"),
        ("make the circle blue", (ONE, OTHER), "2 source pictures"),
        ("put the circle of picture 1 above the circle of picture 1 on the background of picture 1", (ONE, OTHER),
         "two pictures"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(instruction, sources, message):
    with pytest.raises(ValueError, match=message):
        edits.follow(instruction, sources)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_every_instruction_leads_from_its_sources_to_another_scene(split):
    drawn = list(edits.samples(split, 3, 400))
    assert {edit.kind for edit in drawn} == set(edits.KINDS)
    for edit in drawn:
        assert edits.parse(edit.instruction)[0] == edit.kind
        assert edits.follow(edit.instruction.upper() + ".", edit.sources) == edit.target != edit.sources[0]
        assert scenes.parse(scenes.caption(edit.target)) == edit.target
        assert len({thing.colour for thing in edit.target.things}) == len(edit.target.things)


def test_splits_of_edits_do_not_leak():
    shown = {scene for edit in edits.samples("train", 0, 3000) for scene in (*edit.sources, edit.target)}
    assert not any(map(scenes.has_held_out_pair, shown))
    heldout = [edit.target for edit in edits.samples("heldout", 0, 1000)]
    assert not shown & set(heldout)
    assert 0.3 < sum(map(scenes.has_held_out_pair, heldout)) / 1000 < 0.5
    evaluated = list(edits.samples("eval", 0, 300))
    assert not shown & {edit.target for edit in evaluated}
    assert not any(scenes.has_held_out_pair(scene) for edit in evaluated for scene in (*edit.sources, edit.target))


# ------------------------------------------------------------------ pictures
def test_an_edit_depends_on_its_seed_and_index_alone():
    first, again = draw("train", 1, 7, edits.KINDS), draw("train", 1, 7, edits.KINDS)
    assert first[0] == again[0] == edits.sample("train", 1, 7)
    assert all(map(np.array_equal, (*first[1], first[2]), (*again[1], again[2])))
    assert edits.sample("train", 2, 7) != first[0]


@pytest.mark.parametrize("kind", edits.KINDS)
def test_only_what_is_asked_for_has_another_geometry(kind):
    """Fields of an object that an edit of this kind changes."""
    changes = {
        "recolour": {"rgb"}, "resize": {"radius"}, "reshape": {"shape"}, "background": set(), "move": {"x", "y"},
        "swap": {"x", "y"}, "compose": {"x", "y"},
    }[kind]  # fmt: skip
    for index in range(50):
        edit = edits.sample("heldout", 1, index, (kind,))
        sources, target = pictures(edit, np.random.default_rng(index))
        assert (target.background == sources[0].background) == (kind != "background")
        before = [placed for source in sources for placed in source.placed]
        if kind in ("swap", "compose"):  # matched by colour, which neither changes
            before.sort(key=lambda placed: [one.rgb for one in target.placed].index(placed.rgb))
        changed = [{name for name in vars(old) if vars(old)[name] != vars(new)[name]}
                   for old, new in zip(before, target.placed, strict=True)]  # fmt: skip
        assert set().union(*changed) <= changes
        assert sum(map(bool, changed)) == {"background": 0, "swap": 2, "compose": 2}.get(kind, 1)


def test_command_line_writes_sources_targets_and_a_table(tmp_path: Path) -> None:
    edits.main(["render", "--split", "train", "--count", "6", "--out", str(tmp_path), "--kinds", "swap", "compose"])
    rows = json.loads((tmp_path / "metadata.json").read_text())
    for index, row in enumerate(rows):
        edit, sources, target = draw("train", 0, index, ("swap", "compose"))
        assert row == {
            "file_path": f"target/{index:06d}.png",
            "source_file_path": [f"source/{index:06d}_{k + 1}.png" for k in range(len(sources))],
            "text": edit.instruction,
            "type": "image",
        }
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file_path"])), target)
        for path, source in zip(row["source_file_path"], sources, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / path)), source)
    assert {len(row["source_file_path"]) for row in rows} == {1, 2}


def test_every_other_edit_has_objects_of_any_colour_where_it_can_be_told_without_their_names(tmp_path: Path) -> None:
    for name, more in (("named", []), ("free", ["--free-colours"])):
        edits.main(["render", "--split", "train", "--count", "60", "--out", str(tmp_path / name), *more])
    named, free = (json.loads((tmp_path / name / "metadata.json").read_text()) for name in ("named", "free"))
    freed = 0
    for index, (old, new) in enumerate(zip(named, free, strict=True)):
        edit = edits.sample("train", 0, index)
        assert edits.follow(new["text"], edit.sources) == edit.target  # the same edit, whatever it says
        told = edits.parse(new["text"])[1]
        of_a_colour = any(" " in (told.get(key) or "") for key in "ab")
        differs = pictures_of(tmp_path / "named", old) != pictures_of(tmp_path / "free", new)
        assert differs == (index % 2 == 1 and not of_a_colour), (index, new["text"])
        assert index % 2 == 1 or new == old
        freed += differs
    assert freed > 20


def pictures_of(folder: Path, row: dict[str, Any]) -> list[bytes]:
    return [(folder / path).read_bytes() for path in (row["file_path"], *row["source_file_path"])]


# ------------------------------------------------------------------ oracle
def test_the_oracle_accepts_every_edit_and_sees_that_nothing_else_changed(drawn) -> None:
    told, sources, targets = drawn
    prompts = [edit.instruction for edit in told]
    assert edit_adherence(targets, prompts, sources).mean() >= 0.99
    apart = untouched(targets, prompts, sources)
    assert apart.isnan().tolist() == [edit.kind == "compose" for edit in told]
    assert apart.nan_to_num().max() <= 1e-3


def test_the_oracle_refuses_the_source_as_it_was_and_what_another_edit_makes(drawn) -> None:
    told, sources, targets = drawn
    prompts = [edit.instruction for edit in told]
    assert edit_adherence(torch.stack([row[0] for row in sources]), prompts, sources).sum() == 0
    others = targets.roll(EACH, 0)  # of another kind
    same = sum(a.target == b.target for a, b in zip(told, told[-EACH:] + told[:-EACH]))
    assert edit_adherence(others, prompts, sources).sum() <= same


def test_a_change_elsewhere_is_measured(drawn) -> None:
    told, sources, targets = drawn
    some = [i for i, edit in enumerate(told) if edit.kind in ("recolour", "background")]
    prompts, shown = [told[i].instruction for i in some], [sources[i] for i in some]
    darker = untouched((targets[some] - 0.1).clamp(min=0), prompts, shown)
    expected = torch.tensor([0.1 if told[i].kind == "recolour" else 0.05 for i in some])
    assert (darker >= expected - 0.03).all()
    assert (darker <= 0.1 + 1e-6).all()


def test_sources_of_any_size_and_rows_that_nobody_can_judge() -> None:
    edit, (source,), target = draw("train", 4, 0, ("recolour",))
    large = torch.nn.functional.interpolate(tensor(source)[None], 128, mode="nearest")[0]
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert read(noise[None])[0].scene is None
    images, prompts = torch.stack([tensor(target)] * 2), [edit.instruction] * 2
    assert edit_adherence(images, prompts, [[large], [noise]]).tolist() == [1, 0]
    apart = untouched(images, prompts, [[large], [noise]])
    assert apart[0] <= 1e-3
    assert apart[1].isnan()
    with pytest.raises(ValueError, match="not an edit instruction"):
        edit_adherence(images, ["a dog"] * 2, [[large], [large]])
    with pytest.raises(ValueError, match="2 images for 2 prompts and the sources of 1"):
        edit_adherence(images, prompts, [[large]])
