"""Votes on the page in a real browser, from the key to the win rate."""

from __future__ import annotations

import json
import re

import pytest
from browsing import opened_page
from test_side_by_side import MODELS, NASTY, PROMPTS, grey, write_page

from train_t2i.__main__ import main


@pytest.fixture
def opened(browser, tmp_path):
    """(the page in a new tab, what it asked for); nothing went wrong."""
    path = write_page(tmp_path / "page")
    with opened_page(browser, path) as (tab, asked):
        tab.on("dialog", lambda dialog: dialog.accept())
        yield tab, asked


def test_a_voter_sees_what_is_edited(browser, tmp_path):
    path = write_page(tmp_path / "page", ["a", "b"], prompts=2, sources=[[grey(10), grey(20)], []])
    tab = browser.new_page()
    tab.goto(path.as_uri())
    assert tab.is_visible("#edited")
    tab.wait_for_function("[...document.querySelectorAll('#sources img')].every(image => image.naturalWidth === 6)")
    shown_now = "[...document.querySelectorAll('#sources img')].map(image => image.getAttribute('src'))"
    assert tab.evaluate(shown_now) == ["images/00000-source-0.png", "images/00000-source-1.png"]
    tab.keyboard.press("s")
    assert not tab.is_visible("#edited")
    tab.context.close()


def shown(tab):
    """The models on the left and right, by the numbers of their files."""
    tab.wait_for_function("document.getElementById('left').complete && document.getElementById('right').complete")
    return [int(re.search(r"-(\d)\.png$", tab.get_attribute(f"#{side}", "src"))[1]) for side in ("left", "right")]


def saved(tab, tmp_path, name="votes.json"):
    with tab.expect_download() as download:
        tab.click("#download")
    assert download.value.suggested_filename == "votes.json"
    download.value.save_as(tmp_path / name)
    return json.loads((tmp_path / name).read_text())


def test_votes_are_cast_by_key_and_counted(opened, tmp_path, capsys):
    tab, asked = opened
    assert tab.title() == f"of {NASTY}"
    sides = []
    for row in range(PROMPTS):
        assert tab.inner_text("#prompt") == f"{NASTY} {row}"
        assert tab.inner_text("#progress") == f"{row} of {PROMPTS} votes"
        left, _ = shown(tab)
        tab.wait_for_function("document.getElementById('left').naturalWidth === 8")
        sides.append(left)
        # the teacher, model 0, wins five times, wherever it stands; then a tie and a loss
        wanted = 0 if row < 5 else None if row == 5 else 1
        tab.keyboard.press("t" if wanted is None else "a" if left == wanted else "b")
    assert {0, 1} == set(sides)
    assert tab.is_visible("#finished")
    votes = saved(tab, tmp_path)
    assert [vote["choice"] for vote in votes["votes"]].count("tie") == 1
    assert main(["votes", str(tmp_path / "votes.json"), "--out", str(tmp_path / "rates.json")]) == 0
    (rate,) = json.loads((tmp_path / "rates.json").read_text())
    assert (rate["a"], rate["b"]) == ("teacher", NASTY)
    assert (rate["wins"], rate["ties"], rate["losses"], rate["prompts"]) == (5, 1, 1, 7)
    assert rate["win_rate"] == pytest.approx(5.5 / 7)
    assert f"wins {5.5 / 7:.1%}" in capsys.readouterr().out
    assert all(url.startswith("file://") for url in asked if not url.startswith("blob:"))


def test_going_back_skipping_and_coming_again(opened, tmp_path):
    tab, _ = opened
    tab.keyboard.press("a")
    tab.keyboard.press("s")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("u")
    assert tab.get_attribute("#choose-right", "aria-pressed") == "true"
    tab.keyboard.press("ArrowDown")  # thinks again
    tab.reload()
    assert tab.inner_text("#progress") == f"2 of {PROMPTS} votes"
    assert tab.inner_text("#prompt") == f"{NASTY} 1"  # the first that has none
    for _ in range(PROMPTS - 1):
        tab.keyboard.press("s")
    assert tab.inner_text("#skipped") == f"Go through the {PROMPTS - 2} that were skipped"
    tab.click("#skipped")
    assert tab.inner_text("#prompt") == f"{NASTY} 1"
    tab.keyboard.press("Control+a")  # no vote
    votes = saved(tab, tmp_path)["votes"]
    assert [(vote["row"], vote["choice"]) for vote in votes] == [(0, "left"), (2, "tie")]


def test_votes_after_the_names_are_kept_apart(opened, tmp_path, capsys):
    tab, _ = opened
    tab.keyboard.press("a")
    assert not tab.is_visible("#not-blind")
    assert not any(
        model in (tab.get_attribute(f"#{side}", "alt") or "") for model in MODELS for side in ("left", "right")
    )
    tab.click("#tab-names")
    assert tab.locator("#names figcaption").first.is_visible()
    tab.keyboard.press("b")  # a key does nothing here
    tab.click("#tab-vote")
    assert tab.is_visible("#not-blind")
    tab.keyboard.press("a")
    tab.select_option("#pair", "1-2")
    assert set(shown(tab)) == {1, 2}
    tab.click("#choose-left")
    votes = saved(tab, tmp_path)["votes"]
    assert [vote["blind"] for vote in votes] == [True, False, False]
    assert {votes[2]["left"], votes[2]["right"]} == {NASTY, "third"}
    assert main(["votes", str(tmp_path / "votes.json")]) == 0
    assert "2 votes were cast after the names had been shown: left out" in capsys.readouterr().out
