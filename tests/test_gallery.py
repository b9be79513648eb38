"""The gallery: which images it shows of a run, in which place, and what its page does in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import torch
from browsing import opened_page
from PIL import Image
from test_report import Page, write_run
from tiny_runs import refused

from train_t2i.__main__ import main
from train_t2i.gallery import PAGE_PIXELS, WIDTHS_PX, width_for
from train_t2i.gallery_images import keys_of
from train_t2i.log import grid_image, to_pil

NASTY = '</script><script>document.title = "taken"</script> <img src=x onerror=alert(1)> & "a'
STEPS = (0, 10, 20)


def colour(column, row):
    """What tells an image from every other: (column, row, 200); the teacher is column 9."""
    return column * 20, row % 256, 200


def flat(column, row, size=(24, 16)):
    red_green_blue = torch.tensor(colour(column, row)).float() / 255
    return red_green_blue.view(3, 1, 1).expand(3, *size).clone()


def write_sheets(run, prompts, steps=STEPS, *, sources=0, teacher=True, size=(24, 16)):
    """Sample sheets as a run leaves them: images whose colour says column and row."""
    for column, step in enumerate(steps):
        folder = run / "samples" / f"step {step}"
        folder.mkdir(parents=True, exist_ok=True)
        students = torch.stack([flat(column, row, size) for row in range(len(prompts))])
        rows = [torch.ones_like(students)] * sources + [students]
        if teacher:
            rows.append(torch.stack([flat(9, row, size) for row in range(len(prompts))]))
        for row, image in enumerate(students):
            to_pil(image).save(folder / f"student_{row:03d}.png")
        grid_image(rows).save(folder / "grid.png")
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    run = write_run(tmp_path, "run", last=20)
    write_sheets(run, ["a red circle", NASTY, "a blue  cat", "a red cat"], (0, 10, 20))
    (run / "samples" / "step 20" / "student_004.png").write_bytes(b"left by an earlier start of more prompts")
    return run


def gallery(run, *more):
    assert main(["gallery", str(run), *more]) == 0
    return run / "gallery.html"


def images_of(path):
    """Row -> column name -> its image."""
    text = path.read_text("utf-8")
    rows = []
    for article in re.findall(r"<article.*?</article>", text, re.DOTALL):
        uris = re.findall(r'src="data:image/webp;base64,([^"]+)".*?<b>(.*?)</b>', article)
        rows.append({name: Image.open(io.BytesIO(base64.b64decode(uri))) for uri, name in uris})
    return rows


def shown(path):
    """Row -> column name -> the colour of its image."""
    return [{name: image.getpixel((3, 3)) for name, image in row.items()} for row in images_of(path)]


def test_every_image_stands_at_its_prompt_and_step(run):
    rows = shown(gallery(run))
    assert rows == [
        {"teacher": colour(9, row), **{f"step {step}": colour(i, row) for i, step in enumerate(STEPS)}}
        for row in range(4)
    ]


def test_sources_are_not_taken_for_the_teacher_and_methods_without_one_have_none(run):
    settings = json.loads((run / "args.json").read_text())
    write_sheets(run, ["a", "b"], sources=2)
    assert [row["teacher"] for row in shown(gallery(run))] == [colour(9, 0), colour(9, 1)]
    (run / "args.json").write_text(json.dumps(settings | {"method": "direct"}))
    write_sheets(run, ["a", "b"], sources=1, teacher=False)
    assert [list(row) for row in shown(gallery(run))] == [["step 0", "step 10", "step 20"]] * 2


def test_prompts_that_changed_on_the_way_keep_their_own_rows(run):
    """The newest sheet's prompts come first; a prompt that stands twice has two rows."""
    write_sheets(run, ["new", "a red cat", "new"], (20,))
    path = gallery(run)
    told = [words.strip() for words in re.findall(r"<span class=prompt>(.*?)</span>", path.read_text("utf-8"))]
    assert told[:3] == ["new", "a red cat", "new"]
    assert len(told) == 6
    rows = shown(path)
    assert rows[1] == {
        "teacher": colour(9, 1),
        "step 0": colour(0, 3),
        "step 10": colour(1, 3),
        "step 20": colour(0, 1),
    }
    assert rows[2] == {"teacher": colour(9, 2), "step 20": colour(0, 2)}
    assert rows[3]["teacher"] == colour(9, 0)  # of an older sheet
    assert keys_of(["a", "b", "a"]) == (("a", 0), ("b", 0), ("a", 1))


def test_sheets_that_are_not_whole_are_left_out_and_few_of_many_are_spread(run):
    (run / "samples" / "step 10" / "student_002.png").unlink()
    assert list(shown(gallery(run))[0]) == ["teacher", "step 0", "step 20"]
    write_sheets(run, ["a"], range(0, 100, 10))
    names = list(shown(gallery(run, "--max-steps", "4"))[0])
    assert names == ["teacher", "step 0", "step 30", "step 60", "step 90"]


def test_scores_are_those_of_each_image_and_the_log_is_told(run, monkeypatch):
    (run / "loss_logs" / "monitor_log.jsonl").write_text(
        json.dumps({"tick": 21, "step": 10, "samples_seen": 1, "held_out_clip": 0.625}) + "\n"
    )
    text = gallery(run, "--scorer", f"{__name__}:green").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [row == pytest.approx([i / 255] * 4) for i, row in enumerate(data["scores"]["adherence"])] == [True] * 4
    assert data["columns"] == ["teacher", "step 0", "step 10", "step 20"]
    lines = dict(re.findall(r"<tr><th>([\w ()]+)</th>(.*?)</tr>", text))
    assert lines["adherence"] == f"<td>{1.5 / 255:.4f}</td>" * 4
    assert lines["held_out_clip (logged)"] == "<td></td><td></td><td>0.6250</td><td></td>"


def green(images, prompts):
    """A score of one's own: the mean of the green channel."""
    assert len(images) == len(prompts)
    return images[:, 1].mean((1, 2))


def test_images_are_as_large_as_the_page_allows():
    assert width_for(8 * 9) == 512
    assert (width_for(500 * 9), width_for(50_000)) == (128, 96)
    for count in (500, 1000, 3000):
        assert (
            count * width_for(count) ** 2 <= PAGE_PIXELS < count * WIDTHS_PX[WIDTHS_PX.index(width_for(count)) - 1] ** 2
        )


def test_the_page_is_one_small_file(run):
    write_sheets(run, ["a"], (20,), size=(640, 1280))
    path = gallery(run, "--max-steps", "1")
    uris = re.findall(r"base64,([^\"]+)", path.read_text("utf-8"))
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri))) as image:
            assert image.size == (512, 256)
    page = Page(path.read_text("utf-8"))
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/webp;base64,")


def test_checkpoints_draw_prompts_of_a_file(tmp_path, runs, sdxl_folder):
    """The student at every checkpoint and the teacher are those that sample and evaluate make."""
    from train_t2i.choice import ModelChoice, teacher_config
    from train_t2i.student import load_student, load_teacher

    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\nblue\nleft out\n")
    out = tmp_path / "g.html"
    assert main(["gallery", str(runs["one"]), "--prompts", str(prompts), "--count", "2", "--out", str(out)]) == 0
    rows = [{name: image.tobytes() for name, image in row.items()} for row in images_of(out)]
    assert [list(row) for row in rows] == [["teacher", "step 1", "step 2"]] * 2
    asked = ["a red circle", "blue"], [1000, 1001]
    student = load_student(str(runs["one"]), "1").images(*asked)
    choice = ModelChoice(pretrained_model=str(sdxl_folder), resolution="32", mixed_precision="no")
    teacher = load_teacher(teacher_config(choice), 2, 7.0).images(*asked)
    assert [row["step 1"] for row in rows] == [to_pil(image).tobytes() for image in student]
    assert [row["teacher"] for row in rows] == [to_pil(image).tobytes() for image in teacher]


def test_mistakes_are_one_line(tmp_path, run, capsys):
    bare = write_run(tmp_path, "bare", last=3)
    for arguments, said in (
        ([], "0 runs are given"),
        ([run, run], "2 runs are given"),
        ([tmp_path], "not a run folder"),
        ([bare], "no sample sheets"),
        ([bare, "--prompts", run / "args.json"], "no checkpoint of a run"),
        ([run, "--count", "3"], "--count without --prompts does nothing"),
        ([run, "--out", tmp_path], "is a folder"),
        ([run, "--rewards", "nonsense=x"], "no such reward"),
    ):
        assert said in refused(capsys, "gallery", *arguments)
    (run / "samples" / "step 10" / "student_001.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    assert "student_001.png: cannot be read" in refused(capsys, "gallery", run)


# -- in a browser ----------------------------------------------------------------------------------------------------


def visible_rows(tab):
    return tab.evaluate("[...document.querySelectorAll('article:not([hidden])')].map(a => Number(a.dataset.row))")


def visible_columns(tab, row=0):
    found = f'article[data-row="{row}"] figure:not([hidden]) b'
    return [tab.locator(found).nth(i).inner_text() for i in range(tab.locator(found).count())]


def test_a_person_searches_orders_and_steps_through(browser, run):
    path = gallery(run, "--scorer", f"{__name__}:green")
    with opened_page(browser, path) as (tab, _):
        assert tab.title() == "run"
        assert tab.inner_text("#count") == "4 prompts"
        assert tab.locator("article .prompt").nth(1).text_content() == NASTY
        tab.wait_for_function("[...document.images].every(image => image.naturalWidth === 16)")
        tab.keyboard.press("/")
        tab.keyboard.type("CAT a")
        assert visible_rows(tab) == [2, 3]
        assert tab.inner_text("#count") == "2 of 4 prompts"
        tab.fill("#search", "cat blue")
        assert visible_rows(tab) == [2]
        tab.fill("#search", "dog")
        assert tab.is_visible("#none")
        tab.fill("#search", "")
        assert visible_rows(tab) == [0, 1, 2, 3]
        tab.select_option("#order", "adherence|high|last")
        assert visible_rows(tab) == [3, 2, 1, 0]
        tab.select_option("#order", "")
        assert visible_rows(tab) == [0, 1, 2, 3]
        tab.focus("#step")
        tab.keyboard.press("ArrowLeft")
        assert visible_columns(tab) == ["teacher", "step 10"]
        assert tab.inner_text("#chosen") == "step 10"
        tab.click("#all")
        assert visible_columns(tab) == ["teacher", "step 0", "step 10", "step 20"]


def test_a_prompt_is_seen_large(browser, run):
    with opened_page(browser, gallery(run)) as (tab, _):
        tab.fill("#search", "red")
        tab.click('article[data-row="0"] figure[data-column="2"] img')
        large = "[...document.querySelectorAll('#large b')].map(b => b.textContent)"
        assert tab.evaluate(large) == ["teacher", "step 10"]
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate(large) == ["teacher", "step 20"]
        tab.keyboard.press("ArrowDown")
        assert tab.inner_text("#large-prompt") == "a red cat"  # the next that is shown
        tab.keyboard.press("Escape")
        assert not tab.is_visible("#large")


def test_it_can_be_read_without_a_script_and_in_the_dark(browser, run):
    path = gallery(run)
    with opened_page(browser, path, java_script_enabled=False) as (tab, _):
        assert not tab.is_visible("#bar")
        assert tab.locator("article:visible").count() == 4
    background = "getComputedStyle(document.body).backgroundColor"
    with opened_page(browser, path, color_scheme="dark") as (tab, _):
        assert tab.evaluate(background) == "rgb(22, 24, 28)"
