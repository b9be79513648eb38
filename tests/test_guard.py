"""The guard: what counts as a game, exactly, on histories made by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from train_t2i.guard import SURE, Reading, Tolerance, crossed, last_good, rise, verdict, worsens

SPREAD = (0.2, 0.4, 0.6, 0.8)  # scores of four images
DEVIATION = math.sqrt(0.2 / 3)  # of SPREAD
TOLERANCE = Tolerance(reward_drop=0.5, diversity_drop=0.25)


def reading(step: int, up: float = 0.0, held: float = 0.0, wide: float = 1.0, shaken: float = 0.0) -> Reading:
    """All images moved alike from SPREAD: of a reward by ``up``, of a held-out one by ``held``, diversity to ``wide`` of
    itself; ``shaken`` moves half of the held-out scores up and half down."""
    shakes = (shaken, -shaken, shaken, -shaken)
    held_out = tuple(score + held + shake for score, shake in zip(SPREAD, shakes, strict=True))
    return Reading(
        step,
        {"reward_clip": tuple(score + up for score in SPREAD)},
        {"held_out_clip": held_out},
        (0.2 * wide, 0.4 * wide),
    )


def history(*moves: dict[str, float]) -> list[Reading]:
    """Readings ten steps apart, the first of them where rewards begin."""
    return [reading(10 * i, **move) for i, move in enumerate([{}, *moves])]


def names(moves) -> list[str]:
    return [move.name for move in moves]


@pytest.mark.parametrize("seed", range(3))
def test_a_rise_is_the_mean_change_less_its_errors(seed):
    before, now = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    changes = now - before
    expected = changes.mean() - SURE * changes.std() / 9**0.5
    assert rise(tuple(before.tolist()), tuple(now.tolist())) == pytest.approx(float(expected), rel=1e-12)


def test_nothing_is_judged_by_one_reading():
    assert not verdict([], TOLERANCE).gamed
    assert not verdict(history(), TOLERANCE).gamed


def test_a_reward_that_rises_while_a_held_out_one_falls_is_a_game():
    found = verdict(history({"up": 0.1, "held": -0.2}), TOLERANCE)
    assert found.gamed
    (up,), (down,) = found.risen, found.fallen
    assert (up.name, up.since, down.name, down.since) == ("reward_clip", 0, "held_out_clip", 0)
    assert (up.before, up.now, down.before, down.now) == pytest.approx((0.5, 0.6, 0.5, 0.3))


@pytest.mark.parametrize("move", [{"held": -0.2}, {"up": -0.1, "held": -0.2}, {"up": 0.1}, {"up": 0.1, "held": 0.2}])
def test_a_rise_or_a_fall_alone_is_none(move):
    assert not verdict(history(move), TOLERANCE).gamed


@pytest.mark.parametrize(("share", "gamed"), [(0.499, False), (0.501, True)])
def test_a_held_out_reward_may_fall_by_its_share_of_a_deviation(share, gamed):
    assert verdict(history({"up": 0.1, "held": -share * DEVIATION}), TOLERANCE).gamed == gamed


@pytest.mark.parametrize(("share", "gamed"), [(0.74, False), (0.76, True)])
def test_diversity_may_fall_by_its_share(share, gamed):
    """Of 0.2 and 0.4: the mean falls by 0.3 share with an error of 0.1 share, so it surely falls by a third of its share."""
    assert names(verdict(history({"up": 0.1, "wide": 1 - share}), TOLERANCE).fallen) == ["diversity"] * gamed


def test_a_fall_counts_from_the_best_reading_and_a_rise_from_the_first():
    readings = history({"up": 0.2, "held": 0.3}, {"up": 0.1, "held": 0.1})
    found = verdict(readings, TOLERANCE)
    assert (found.fallen[0].since, found.risen[0].since) == (10, 0)
    assert found.gamed  # although both are above where they began
    assert not verdict([readings[0], readings[2]], TOLERANCE).gamed


def test_a_fall_within_its_error_is_none():
    """The mean falls by 0.2; half of the images change by 0.2 more, half by 0.2 less: error 0.2 * 2 / sqrt 3 / 2."""
    assert verdict(history({"up": 0.1, "held": -0.2}), TOLERANCE).gamed
    assert not verdict(history({"up": 0.1, "held": -0.2, "shaken": 0.2}), TOLERANCE).gamed


def test_a_crossing_is_told_once_and_again_after_it_was_mended():
    fallen = {"up": 0.1, "held": -0.2}
    readings = history(fallen, fallen, {"up": 0.1}, fallen, {**fallen, "wide": 0.1})
    told = [names(crossed(readings[:n], TOLERANCE).fallen) for n in range(1, 7)]
    assert told == [[], ["held_out_clip"], [], [], ["held_out_clip"], ["diversity"]]


def test_what_falls_on_worsens_and_what_recovers_does_not():
    readings = history({"up": 0.1, "held": -0.3}, {"up": 0.1, "held": -0.25}, {"up": 0.1, "held": -0.26})
    assert [worsens(readings[:n], TOLERANCE) for n in range(1, 5)] == [False, True, False, True]


def test_the_last_good_reading_is_before_the_game():
    fallen = {"up": 0.1, "held": -0.2}
    assert last_good([], TOLERANCE) is None
    assert last_good(history({"up": 0.1}, fallen, fallen), TOLERANCE) == 10
    assert (
        last_good(history({"up": 0.1}, {"held": -0.2}, fallen), TOLERANCE) == 10
    )  # on the way down nothing had risen yet
    assert last_good(history(fallen, {}), TOLERANCE) == 20


def test_a_reading_comes_back_from_a_record_as_it_was():
    first = reading(3, up=1 / 3, held=-1e-17)
    assert Reading(**dataclasses.asdict(first)) == first
    assert first.means() == {
        "reward_clip": pytest.approx(0.5 + 1 / 3), "held_out_clip": pytest.approx(0.5), "diversity": pytest.approx(0.3),
        "recall": None,
    }  # fmt: skip


@pytest.mark.parametrize("broken", [{"up": math.nan}, {"held": math.inf}, {"wide": math.nan}])
def test_a_score_that_is_no_number_is_seen(broken):
    assert reading(0).finite
    assert not reading(0, **broken).finite
