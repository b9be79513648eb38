"""What a row says of scores and features that are known: intervals, distances, times, what was asked; and its page."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_metrics import covered_by_loops, normal

from train_t2i import metrics
from train_t2i.evaluation import measure
from train_t2i.evaluation.features import distances
from train_t2i.families import Source
from train_t2i.image_layouts import Entry, asked_images

SCORERS = SimpleNamespace(
    features=SimpleNamespace(references={}, of=lambda images: {}, prepare=lambda size_px: None),
    rewards={},
    told={},
    identity=str,
    scores=lambda images, prompts, sources: {},
)


def candidate(**more):
    """Whose images are there already, black."""
    told = dict.fromkeys(("step", "run", "resolution", "model"))
    fixed = {"name": "known", "size_px": (2, 2), "makes": False, "network_calls": None, "told": told}
    return SimpleNamespace(
        **fixed
        | {"seeds": lambda asked: None, "images": lambda asked, sources: torch.zeros(len(asked), 3, 2, 2)}
        | more
    )


def told_of(made, asked, sources=()):
    return measure.measured(candidate(), "known", made, asked, SCORERS, 2, sources)


def source(grey):
    return Source(torch.full((3, 4, 6), grey, dtype=torch.uint8), torch.zeros(3, 2, 2, dtype=torch.uint8))


def test_an_interval_is_that_of_the_prompts_drawn_with_the_seed_of_the_row():
    """Two images of each of 20 prompts: their means are drawn from, not the 40 images."""
    scores = normal(2, 20)
    asked = asked_images([Entry(f"{i}", "") for i in range(20)], 2, 9)
    row, _ = told_of(measure.Made(values={"clip": [scores[0, :15], torch.cat([scores[0, 15:], scores[1]])]}), asked)
    assert row["ci"]["clip"] == list(metrics.bootstrap_ci(scores.mean(0), seed=9))
    assert row["ci"]["clip"] != list(metrics.bootstrap_ci(scores.mean(0)))


def test_distances_are_those_of_the_documents():
    """The kernel of the cosine over all pairs of different rows, and three neighbours."""
    made, real = (torch.nn.functional.normalize(rows) for rows in (normal(30, 6), normal(30, 6, seed=1) + 0.9))

    def mean_kernel(pairs):
        return float(torch.stack([(x @ y + 1) ** 3 for x, y in pairs]).mean())

    found = distances("held_out", made, real)
    within = sum(mean_kernel(itertools.permutations(rows, 2)) for rows in (made, real))
    assert found["kid"] == pytest.approx(within - 2 * mean_kernel(itertools.product(made, real)), rel=1e-9)
    assert found["recall"] == covered_by_loops(real, made, 3)
    assert found["precision"] == covered_by_loops(made, real, 3)


def test_the_time_of_an_image_is_the_median_of_batches():
    made = measure.Made(values={"clip": [torch.ones(1)]}, seconds_per_image=[1.0, 9.0, 2.0])
    assert told_of(made, asked_images([Entry("a", "")], 1, 0))[0]["ms_per_image"] == 2000


def test_what_was_asked_is_prompts_sources_and_images_a_prompt():
    def asked_of(prompts, samples=1, greys=(1, 2)):
        asked = asked_images([Entry(prompt, "") for prompt in prompts], samples, 0)
        made = measure.Made(values={"clip": [torch.ones(len(asked))]})
        return told_of(made, asked, [[source(grey)] for grey in greys])[1].prompts

    asked = asked_of("ab")
    assert asked == asked_of("ab")
    assert asked not in {asked_of("ac"), asked_of("ba"), asked_of("ab", 2), asked_of("ab", greys=(1, 3))}
    assert asked != asked_of("ab", greys=())


def test_the_page_is_handed_what_an_edit_starts_from(tmp_path):
    from train_t2i.evaluate import EvaluateConfig, evaluate_model
    from train_t2i.evaluation.side_by_side import SideBySide

    page = SideBySide(tmp_path, 10, 0)
    edits = candidate(entries=lambda questions: ([Entry("a", ""), Entry("b", "")], [[source(1)], []]))
    scored = SimpleNamespace(**vars(SCORERS) | {"scores": lambda images, *_: {"clip": images.mean((1, 2, 3))}})
    evaluate_model(lambda: edits, None, scored, EvaluateConfig(), page)
    assert [row["sources"] for row in page.data()["rows"]] == [["images/00000-source-0.png"], []]


def test_times_leave_the_warm_up_and_the_rest_out(monkeypatch):
    def timed(model, asked, sources):
        made.append((len(asked), asked[0].seed))
        return torch.zeros(len(asked), 3, 2, 2), float(len(made))

    monkeypatch.setattr(measure, "timed_images", timed)
    for count, makes, batches, seconds in (
        (7, True, [(2, 0), (2, 2), (2, 4), (1, 6)], [2.0, 3.0]),
        (2, True, [(2, 0), (2, 0)], [2.0]),
        (3, True, [(2, 0), (2, 0), (1, 2)], [2.0]),
        (3, False, [(2, 0), (1, 2)], []),  # images that are there already take no time
    ):
        made = []
        asked = asked_images([Entry("a", "")] * count, 1, 0)
        kept = measure.make_and_score(candidate(makes=makes), asked, SCORERS, 2, "x")
        assert made == batches
        assert kept.seconds_per_image == seconds
