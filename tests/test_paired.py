"""Paired comparisons: what is compared with what, and how sure it is."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import refused

from train_t2i import metrics
from train_t2i.__main__ import main
from train_t2i.evaluation.paired import Scored, by_prompt, pairs
from train_t2i.evaluation.table import markdown


def scored(model, *, prompts="p", noise="n", scorer="s", **values):
    return Scored(model, prompts, noise, dict.fromkeys(values, scorer), {k: v.tolist() for k, v in values.items()})


def draws(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_pair_sees_what_two_intervals_hide():
    """Prompts differ far more than models do: B is 0.1 better on each, within noise of 0.2, where prompts spread by 1."""
    hard, noise = draws(200, 0), 0.2 * draws(200, 1)
    a, b = hard, hard + 0.1 + noise
    (pair,) = pairs([scored("a", clip=a), scored("b", clip=b)])
    apart = pair["differences"]["clip"]
    assert apart["mean"] == pytest.approx(float((a - b).mean()), rel=1e-12)
    assert apart["ci"] == pytest.approx(metrics.bootstrap_ci(a - b))
    assert apart["ci"][1] < 0
    alone = [metrics.bootstrap_ci(values) for values in (a, b)]
    assert alone[0][1] > alone[1][0]  # the intervals overlap


def test_what_is_not_the_same_is_not_compared():
    values = draws(5, 0)
    one = scored("one", clip=values, hps=values)
    assert pairs([one, scored("other prompts", prompts="q", clip=values)]) == []
    assert pairs([one, scored("other weights", scorer="t", clip=values)]) == []
    assert pairs([one, scored("other score", aesthetic=values)]) == []
    (pair,) = pairs([one, scored("half", clip=values)])
    assert list(pair["differences"]) == ["clip"]
    for noise, same in (("n", True), ("m", False), (None, None)):
        assert pairs([one, scored("x", noise=noise, clip=values)])[0]["same_noise"] is same
    assert [(p["a"], p["b"]) for p in pairs([one, scored("two", clip=values), scored("three", clip=values)])] == [
        ("one", "two"), ("one", "three"), ("two", "three"),
    ]  # fmt: skip


def test_a_prompt_of_several_images_counts_once():
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 6.0, 7.0])  # the first images of three prompts, then their second
    assert by_prompt(scores, 3).tolist() == [3.0, 4.0, 5.0]


def test_models_evaluated_on_different_days_are_paired(runs, tmp_path, prompts_file, towers):
    out = tmp_path / "table.json"
    common = ["--prompts", str(prompts_file), "--count", "4", "--rewards", f"clip={towers['clip']}", "--out", str(out)]

    def found():
        return {
            (p["a"], p["b"]): p["same_noise"] for p in json.loads(out.with_suffix(".paired.json").read_text())["pairs"]
        }

    assert main(["evaluate", str(runs["one"]), *common]) == 0
    assert found() == {}
    assert main(["evaluate", str(runs["four"]), *common]) == 0
    assert found() == {("one@2", "four@2"): True}
    rows = {row["model"]: row for row in json.loads(out.read_text())}
    (pair,) = json.loads(out.with_suffix(".paired.json").read_text())["pairs"]
    apart = pair["differences"]["clip"]["mean"]
    assert apart == pytest.approx(rows["one@2"]["clip"] - rows["four@2"]["clip"], abs=1e-6)
    assert main(["evaluate", str(runs["lora"]), *common, "--seed", "5"]) == 0
    assert found() == {("one@2", "four@2"): True, ("one@2", "lora@2"): False, ("four@2", "lora@2"): False}
    assert main(["evaluate", str(runs["four"]), *common, "--count", "3"]) == 0  # a later flag wins: other prompts
    assert found() == {("one@2", "lora@2"): False}
    text = out.with_suffix(".md").read_text()
    assert "| one@2 - lora@2 | other |" in text
    assert text.count("| one@2 |") == 1


def test_a_damaged_file_of_scores_is_told(runs, tmp_path, capsys, prompts_file):
    (tmp_path / "table.paired.json").write_text('{"scored": [{"model": 1}]}')
    told = refused(capsys, "evaluate", runs["one"], "--prompts", prompts_file, "--out", tmp_path / "table.json")
    assert "table.paired.json: cannot be read" in told


def test_markdown_escapes_and_marks_what_is_sure():
    nasty = "a|b <script> [x](y)"
    rows = [
        {
            "model": nasty,
            "network_calls": 1,
            "clip": 0.5,
            "ci": {"clip": [0.4, 0.6]},
            "kid": 0.25,
            "count": 2,
            "seed": 1,
        }
    ]
    sure = {"mean": 0.1, "ci": [0.05, 0.15]}
    unsure = {"mean": 0.1, "ci": [-0.05, 0.25]}
    pair = {"a": nasty, "b": "b", "same_noise": None, "count": 2, "differences": {"clip": sure, "hps": unsure}}
    text = markdown(rows, [pair])
    assert r"a\|b \<script\> \[x\]\(y\)" in text
    assert "0.5 (0.4 to 0.6)" in text
    assert "| unknown | **+0.1 (+0.05 to +0.15)** | +0.1 (-0.05 to +0.25) |" in text
    heads = next(line for line in text.splitlines() if line.startswith("| model"))
    assert "kid (lower is better)" in heads
    assert "frechet" not in heads  # measured of no row
