"""The page to vote on: whole, offline, safe; what it shows, on which side."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser

import torch
from PIL import Image
from tiny_runs import refused

from train_t2i.__main__ import main
from train_t2i.evaluation.side_by_side import SideBySide, drawn_sides
from train_t2i.families import Source
from train_t2i.image_layouts import Entry, asked_images

NASTY = '</script><script>document.title = "taken"</script> & "a\' <img src=x onerror=alert(1)>'
MODELS = ["teacher", NASTY, "third"]
PROMPTS = 7


def grey(level, height_px=4):
    """A source of an edit."""
    return Source(torch.full((3, height_px, 6), level, dtype=torch.uint8), torch.zeros(3, 2, 2, dtype=torch.uint8))


def write_page(folder, models=MODELS, count=100, prompts=PROMPTS, sources=()):
    """A page whose images say by their colour which model made them: red, green, blue.  ``sources``: of each prompt."""
    page = SideBySide(folder, count, seed=3)
    for number, model in enumerate(models):
        keep = page.keep(model, prompts, sources)
        for asked in asked_images([Entry(f"{NASTY} {i}", "") for i in range(prompts)], 2, 50):
            image = torch.zeros(3, 8, 8)
            image[number] = 0.5 + asked.row / 100
            keep(asked, image)
    return page.write(f"of {NASTY}")


class Page(HTMLParser):
    """Tags with their attributes, the text of each kind of element, and the columns [label, images] of each row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.texts, self.rows = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "article":
            self.rows.append([])
        elif self.rows and tag == "figure":
            self.rows[-1].append(["", []])
        elif self.rows and tag == "img":
            self.rows[-1][-1][1].append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside:
            self.texts.setdefault(self.inside[-1], []).append(data)
            if self.rows and self.inside[-1] == "figcaption":
                self.rows[-1][-1][0] += data


def test_the_page_is_offline_and_escapes_what_it_shows(tmp_path):
    path = write_page(tmp_path / "page", sources=[[grey(1)]] * PROMPTS)
    assert str(tmp_path) not in path.read_text()
    page = Page(path.read_text())
    scripts = page.texts["script"]
    assert len(scripts) == 2
    data = json.loads(scripts[0])
    assert data["models"] == MODELS
    assert data["rows"][2]["prompt"] == f"{NASTY} 2"
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), tag
        assert not {"href", "action", "srcset"} & attrs.keys()
        if "src" in attrs:
            assert re.fullmatch(r"images/\d{5}-(source-)?\d\.png", attrs["src"])
            assert (path.parent / attrs["src"]).is_file()
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    for kind, text in (("script-src", scripts[1]), ("style-src", page.texts["style"][0])):
        hashed = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{hashed}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert any(NASTY in text for text in page.texts["figcaption"])


def test_sides_are_drawn_half_and_half():
    for count in (10, 100):
        sides = drawn_sides(count, "1000 0-1")
        assert Counter(sides) == {True: count // 2, False: count // 2}
        assert sides == drawn_sides(count, "1000 0-1")
        assert sides != drawn_sides(count, "1001 0-1")
        assert sides != sorted(sides)


def test_a_page_draws_the_sides_of_each_pair_from_its_seed(tmp_path):
    rows = json.loads(Page(write_page(tmp_path / "page").read_text()).texts["script"][0])["rows"]
    for pair in ("0-1", "0-2", "1-2"):
        assert [row["flipped"][pair] for row in rows] == drawn_sides(PROMPTS, f"3 {pair}")


def test_what_is_shown_is_spread_over_all_prompts(tmp_path):
    write_page(tmp_path / "page", ["a", "b"], count=4, prompts=40)
    assert sorted(path.name for path in (tmp_path / "page" / "images").iterdir()) == [
        f"{row:05d}-{model}.png" for row in (0, 10, 20, 30) for model in (0, 1)
    ]
    with Image.open(tmp_path / "page" / "images" / "00010-1.png") as image:
        assert image.getpixel((0, 0)) == (0, 153, 0)  # of the first image of the prompt


def test_votes_belong_to_the_images_that_were_shown(tmp_path):
    (asked,) = asked_images([Entry("a", "")], 1, 0)
    sheets = []
    for folder, level in (("page", 0.5), ("again", 0.5), ("other", 0.6)):
        page = SideBySide(tmp_path / folder, 10, seed=3)
        page.keep("run", 1)(asked, torch.full((3, 8, 8), level))
        sheets.append(page.data()["sheet"])
    assert sheets[0] == sheets[1] != sheets[2]


def test_one_model_is_only_shown(tmp_path):
    page = Page(write_page(tmp_path / "page", ["alone"]).read_text())
    assert "script" not in page.texts
    assert page.texts["figcaption"].count("alone") == PROMPTS


def test_the_first_column_of_edits_is_what_they_start_from(tmp_path):
    """Two sources, none and one: the models stay in their columns."""
    sources = [[grey(10), grey(200, height_px=8)], [], [grey(30)]]
    path = write_page(tmp_path / "page", ["a", "b"], prompts=3, sources=sources)
    page = Page(path.read_text())
    rows = page.rows
    assert [row[0] for row in rows] == [
        ["source", ["images/00000-source-0.png", "images/00000-source-1.png"]],
        ["", []],
        ["source", ["images/00002-source-0.png"]],
    ]
    assert [row[1:] for row in rows] == [
        [["a", [f"images/{row:05d}-0.png"]], ["b", [f"images/{row:05d}-1.png"]]] for row in range(3)
    ]
    assert ".row { --columns: 3; }" in path.read_text()
    with Image.open(path.parent / rows[0][0][1][1]) as image:
        assert (image.size, image.getpixel((0, 0))) == ((6, 8), (200, 200, 200))
    told = json.loads(page.texts["script"][0])
    assert [row["sources"] for row in told["rows"]] == [row[0][1] for row in rows]
    sources[2] = [grey(31)]  # votes on edits of another image are those of another page
    other = write_page(tmp_path / "other", ["a", "b"], prompts=3, sources=sources)
    assert json.loads(Page(other.read_text()).texts["script"][0])["sheet"] != told["sheet"]


def test_a_page_of_no_edits_has_no_column_of_sources(tmp_path):
    path = write_page(tmp_path / "page", ["a", "b"], prompts=2)
    assert [[label for label, _ in row] for row in Page(path.read_text()).rows] == [["a", "b"], ["a", "b"]]
    assert ".row { --columns: 2; }" in path.read_text()


def test_sources_come_from_whichever_model_edits(tmp_path):
    """A folder of images that stands first has none to show."""
    page = SideBySide(tmp_path, 10, seed=3)
    (asked,) = asked_images([Entry("a", "")], 1, 0)
    for model, sources in (("folder", []), ("run", [[grey(7)]]), ("later", [[grey(8)]])):
        page.keep(model, 1, sources)(asked, torch.zeros(3, 8, 8))
    (row,) = page.data()["rows"]
    assert row["sources"] == ["images/00000-source-0.png"]
    with Image.open(tmp_path / row["sources"][0]) as image:
        assert image.getpixel((0, 0)) == (7, 7, 7)


def test_evaluate_writes_the_page_once(runs, tmp_path, capsys, prompts_file):
    arguments = [
        "evaluate",
        runs["one"],
        runs["four"],
        "--prompts",
        prompts_file,
        "--count",
        3,
        "--side-by-side",
        tmp_path / "page",
    ]
    assert main([*map(str, arguments)]) == 0
    assert str(tmp_path / "page" / "index.html") in capsys.readouterr().out
    data = json.loads(Page((tmp_path / "page" / "index.html").read_text()).texts["script"][0])
    assert data["models"] == ["one@2", "four@2"]
    assert [(row["prompt"], row["seed"]) for row in data["rows"]] == [
        (prompt, 1000 + i) for i, prompt in enumerate(prompts_file.read_text().splitlines()[:3])
    ]
    assert "already holds a page" in refused(capsys, *arguments)
