"""Win rates: who won, whatever the side; what is no vote of ours is refused."""

from __future__ import annotations

import json

import pytest
from tiny_runs import refused

from train_t2i.__main__ import main
from train_t2i.metrics import wilson_interval
from train_t2i.votes import read_votes, win_rates


def vote(row, left, right, choice, blind=True):
    return {"row": row, "prompt": "p", "left": left, "right": right, "choice": choice, "blind": blind}


def file(path, *votes, models=("a", "b", "c"), sheet="s", **changed):
    path.write_text(
        json.dumps({"format": "train_t2i votes", "sheet": sheet, "models": models, "votes": votes} | changed)
    )
    return path


def test_a_win_is_the_models_and_not_the_sides(tmp_path):
    votes = file(
        tmp_path / "v.json",
        vote(0, "b", "a", "right"), vote(1, "a", "b", "left"), vote(2, "b", "a", "left"), vote(3, "b", "a", "tie"),
        vote(0, "c", "b", "left"), vote(4, "a", "b", "right", blind=False),
    )  # fmt: skip
    first, second = win_rates(read_votes(str(votes)))
    assert (first.a, first.b, first.wins, first.ties, first.losses) == ("a", "b", 2, 1, 1)
    assert first.win_rate == 2.5 / 4
    assert first.ci == wilson_interval(2.5 / 4, 4)
    assert first.left_rate == 2.5 / 4  # right, left, left, tie
    assert (second.a, second.b, second.losses) == ("b", "c", 1)


def test_two_voters_on_one_prompt_are_one_trial(tmp_path):
    files = [file(tmp_path / f"{i}.json", *(vote(row, "a", "b", "left") for row in range(5))) for i in range(3)]
    (rate,) = win_rates(each for path in files for each in read_votes(str(path)))
    assert (rate.votes, rate.prompts, rate.win_rate) == (15, 5, 1.0)
    assert rate.ci == wilson_interval(1.0, 5)  # no surer than five prompts can be
    other = file(tmp_path / "other.json", vote(0, "a", "b", "right"), sheet="another page")
    (rate,) = win_rates(each for path in (files[0], other) for each in read_votes(str(path)))
    assert (rate.prompts, rate.win_rate) == (6, pytest.approx(5 / 6))
    once = file(tmp_path / "once.json", vote(5, "a", "b", "right"))
    (rate,) = win_rates(each for path in (*files, once) for each in read_votes(str(path)))
    assert rate.win_rate == pytest.approx(5 / 6)  # fifteen votes on five prompts weigh as five


def test_mistakes_of_votes(tmp_path, capsys):
    good = vote(0, "a", "b", "left")
    for changed, said in (
        ({"format": "other"}, "not a votes file"),
        ({"votes": {}}, "not a votes file"),
        ({"votes": [good, good | {"choice": "both"}]}, "vote 2 is damaged"),
        ({"votes": [good | {"row": "0"}]}, "vote 1 is damaged"),
        ({"votes": [good | {"left": "unknown"}]}, "vote 1 is damaged"),
        ({"votes": [{"row": 0}]}, "vote 1 is damaged"),
        ({"models": None}, "vote 1 is damaged"),
        ({"votes": [good, vote(0, "b", "a", "tie")]}, "two votes on one prompt and pair"),
        ({"votes": [good | {"blind": False}]}, "no blind vote"),
    ):
        assert said in refused(capsys, "votes", file(tmp_path / "v.json", good, **changed)), changed
    (tmp_path / "v.json").write_text("{")
    assert "cannot be read" in refused(capsys, "votes", tmp_path / "v.json")
    assert "no votes to count" in refused(capsys, "votes")
    sound = file(tmp_path / "v.json", good)
    assert "cannot be written" in refused(capsys, "votes", sound, "--out", sound / "x.json")
    assert main(["votes", str(sound)]) == 0
