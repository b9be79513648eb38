"""The report: what it reads, what it draws, and that its page is whole, offline and safe."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import socket
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from browsing import opened_page
from PIL import Image

from train_t2i.__main__ import main
from train_t2i.environment import environment
from train_t2i.report_data import offsets, read_run, spread, thin
from train_t2i.report_page import card
from train_t2i.report_plots import Curve, draw_panel, smooth
from train_t2i.report_tables import cost_table, environment_table

NASTY = '<script>alert("x")</script> & $\\frac{a}{b}$'


def write_run(root: Path, name: str, *, first=0, last=30, method="dmdr", rewards=False, prompts=(NASTY,), **settings):
    """A run folder with logs of known numbers: two guidance updates a step, loss = the step."""
    run = root / name
    (run / "loss_logs").mkdir(parents=True)
    (run / "args.json").write_text(json.dumps({"method": method, "sample_num_steps": 1, **settings}))
    gen, gui, tick = [], [], 0
    for step in range(first, last):
        for half in range(2):
            tick += 1
            counters = {"tick": tick, "step": step + half, "samples_seen": 4 * tick, "seconds_tick": 0.5}
            gui.append(counters | {"loss": 1.0, "grad_norm": 2.0, "lr": 1e-4, "skipped": 0.0})
        reward = {"reward_clip": 0.01 * step if rewards else None}
        gen.append(counters | {"loss": float(step), "grad_norm": 1.0, "lr": 1e-5, "skipped": 0.0} | reward)
    for file, lines in (("loss_gen_log.jsonl", gen), ("loss_gui_log.jsonl", gui)):
        (run / "loss_logs" / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (first, last):
        folder = run / "samples" / f"step {step}"
        folder.mkdir(parents=True)
        Image.new("RGB", (60, 40), (step % 255, 0, 0)).save(folder / "grid.png")
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return run


class Page(HTMLParser):
    """Tags of a document, with every attribute, checked to be nested properly."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def story(tmp_path):
    cold = write_run(tmp_path, "cold", learning_rate_gen=1e-4)
    dmdr = write_run(tmp_path, "dmdr", first=30, last=60, rewards=True, learning_rate_gen=1e-5, magic_prompt=NASTY)
    rows = [
        {"model": "teacher", "network_calls": 50, "adherence": 0.945, "frechet": 0.03, "count": 500, "clip": None,
         "ci": {"adherence": [0.925, 0.965]}},
        {"model": NASTY, "network_calls": 1, "adherence": 0.9, "frechet": 0.02, "count": 500, "ci": {},
         "rewards": ["clip", "some_reward"], "some_reward": 21.5},
    ]  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(rows))
    return tmp_path, [str(cold), str(dmdr)]


def report(root, runs, *more):
    assert main(["report", *runs, "--out", str(root / "report"), *more]) == 0
    return (root / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_is_whole_offline_and_safe(story):
    root, runs = story
    text = report(root, runs, "--table", str(root / "table.json"), "--title", NASTY)
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == names.count("style") == 1
    assert "link" not in names
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert (
            f"{kind}-src '{'sha256-' + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy
        )
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        if "src" in attributes:
            assert re.match("data:image/(png|webp);base64,", attributes["src"])
            assert attributes["alt"]
        if tag == "a":
            assert attributes["href"].startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    assert "".join(page.words).count(NASTY) >= 4  # title, prompts, setting, model: as words, not as markup
    sheets = [a for tag, a in page.tags if tag == "img" and a["alt"].startswith("samples at step")]
    assert [a["alt"] for a in sheets] == [f"samples at step {n}" for n in (0, 30, 30, 60)]


def test_plots_are_pictures_of_what_the_runs_have(story):
    root, runs = story
    report(root, runs)
    plots = {path.stem: Image.open(path).size for path in (root / "report" / "plots").glob("*.png")}
    assert plots.keys() == {"rewards", "losses", "gradients", "speed"}
    assert all(width > 400 and height > 300 for width, height in plots.values())
    for name in plots:
        assert (root / "report" / "plots" / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    report(root, runs[:1])  # without rewards
    assert not list((root / "report" / "plots").glob("rewards.*"))


def settings_rows(text):
    """(names of highlighted settings, names of the others)."""
    rows = re.findall(r"<tr( class=differs)?><td>(\w+)</td>", text[text.index("Settings that") :])
    return {name for mark, name in rows if mark}, {name for mark, name in rows if not mark}


def test_only_differing_settings_are_marked(story):
    root, runs = story
    assert settings_rows(report(root, runs)) == (
        {"learning_rate_gen", "magic_prompt"},
        {"method", "sample_num_steps"},
    )
    marked, rest = settings_rows(report(root, runs[:1]))  # of one run: what is not the default
    assert marked == {"learning_rate_gen"}
    assert rest == {"method", "sample_num_steps"}


def test_tables_show_values_intervals_and_the_best(story):
    root, runs = story
    text = report(root, runs, "--table", str(root / "table.json"))
    assert "<td class=best>0.945<small>0.925 to 0.965</small></td>" in text
    assert "<td class=best>0.0200</td>" in text  # the lower distance
    assert "<th>some_reward<small>higher is better</small></th>" in text  # a reward that the page does not know
    assert "<td>21.5000</td>" in text
    assert "500 prompts" in text
    assert "HPS" not in text[text.index("<thead>") : text.index("</thead>")]  # no column without a number


# -- what is read ----------------------------------------------------------------------------------------------------


def test_series_are_the_logged_numbers(tmp_path):
    run = read_run(str(write_run(tmp_path, "a", first=2, last=5, rewards=True)))
    assert run.series["gen/loss"] == ([3, 4, 5], [2.0, 3.0, 4.0])
    assert run.series["gen/reward_clip"][1] == [0.02, 0.03, 0.04]
    assert run.series["gui/loss"][0] == [2, 3, 3.5, 4, 4.5, 5]
    assert (run.first_step, run.last_step, run.samples_seen, run.seconds) == (3, 5, 24, 3.0)


def test_nulls_are_left_out_and_a_torn_line_is_counted(tmp_path):
    folder = write_run(tmp_path, "a", last=3)
    with open(folder / "loss_logs" / "loss_gen_log.jsonl", "a") as file:
        file.write('{"tick": 7, "st')
    run = read_run(str(folder))
    assert "gen/reward_clip" not in run.series
    assert len(run.series["gen/loss"][0]) == 3
    assert run.unreadable == 1


def test_stages_follow_each_other(tmp_path):
    ode = read_run(str(write_run(tmp_path, "ode", last=40)))
    cold = read_run(str(write_run(tmp_path, "cold", last=30)))
    dmdr = read_run(str(write_run(tmp_path, "dmdr", first=30, last=90)))
    assert offsets([ode, cold, dmdr]) == [0, 40, 40]  # dmdr counts on from cold's 30
    assert offsets([dmdr]) == [0]
    other = read_run(str(write_run(tmp_path, "other", first=30, last=50)))
    assert offsets([ode, cold, dmdr, other]) == [0, 40, 40, 40]  # from the same checkpoint: one over the other


def test_network_calls_of_an_image_count_guided_ones_twice(tmp_path):
    for method, cfg, calls in (("sft", 7.0, 50), ("sft", 1.0, 25), ("dmdr", 7.0, 1)):
        name = f"{method}-{cfg}"
        run = write_run(tmp_path, name, last=2, method=method, teacher_cfg=cfg, teacher_num_steps=25)
        assert f"<dt>network calls</dt><dd>{calls}</dd>" in card(0, read_run(str(run)))


def test_small_pieces():
    assert spread([0, 0, 1, 2, 2]) == [0, 0.5, 1, 2, 2.5]
    assert thin(range(10), 4) == [0, 3, 6, 9]
    assert thin(range(3), 4) == [0, 1, 2]
    assert thin(range(3), 1) == [2]
    assert smooth([1.0] * 50) == [1.0] * 50
    line = [float(i) for i in range(100)]
    assert smooth(line)[10:90] == line[10:90]
    assert smooth([0, 0, 10, 0, 0])[2] == 2


# -- curves ----------------------------------------------------------------------------------------------------------


def lines_of(label, curve, smoothing, log=False):
    """What a panel draws, as lists of y values."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_panel(axes, label, [Curve(0, 100, curve)], log=log, smoothing=smoothing)
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_curves_are_the_values_and_their_running_mean():
    steps, values = [float(i) for i in range(40)], [float(i % 2) for i in range(40)]
    places = [step + 100 for step in steps]
    assert lines_of("loss", (steps, values), 0.25) == [(places, values), (places, smooth(values, 0.25))]
    assert lines_of("loss", (steps, values), 0.0) == [(places, values)]
    assert lines_of("loss", (steps[:11], values[:11]), 0.25) == [(places[:11], values[:11])]


def test_what_the_guard_said_is_told_and_marked(story, monkeypatch):
    root, runs = story
    at = "2026-01-01T00:00:00 "
    said = [
        f"{at}warning: reward guard: step 40: rose: reward_clip 0.1 -> 0.2; fell: {NASTY}",
        f"{at}reward guard: step 50: rewards now count 0.5: an earlier start",
        f"{at}reward guard: step 50: rewards now count 0.5: rose",
        f"{at}step 50 tick 3 loss 1",
    ]
    (root / "dmdr" / "log.txt").write_text("\n".join(said) + "\n")
    reading = {"tick": 80, "step": 40, "samples_seen": 1, "reward_clip": 0.5, "guard_scale": 1.0}
    (root / "dmdr" / "loss_logs" / "monitor_log.jsonl").write_text(json.dumps(reading) + "\n")
    assert [step for step, _ in read_run(runs[1]).guard] == [40, 50]
    (root / "dmdr" / "environment.jsonl").write_text('{"tick": 0, "num_processes": 1, "device": "H200"}\n')
    marks = {}
    from matplotlib.axes import Axes

    def note(axes, x, **kwargs):
        marks.setdefault(axes.get_title(loc="left"), []).append(x)

    monkeypatch.setattr(Axes, "axvline", note)
    text = report(root, runs)
    assert marks["CLIP reward"] == marks["clip reward, fixed prompts"] == [40, 50]
    assert "generator, all terms" not in marks
    section = text[text.index(">Reward guard</h2>") :]
    assert "<td>dmdr</td><td>50</td><td>rewards now count 0.5: rose</td>" in section
    assert "an earlier start" not in text
    assert html.escape(NASTY) in section


# -- cost and environment --------------------------------------------------------------------------------------------


def test_cost_counts_the_processes_of_each_start(tmp_path):
    """Ticks of half a second, two a step: the first 20 on two devices, the others on four."""
    run = write_run(tmp_path, "a", last=30)
    start = {"started": "2026-01-01T00:00:00+00:00", "code_version": "0.1.0", "python": "3.11.9", "backend": "fsdp2"}
    starts = [
        start | {"tick": 0, "num_processes": 2, "device": "H200", "packages": {"torch": "2.12.1", NASTY: "1"}},
        start | {"tick": 30, "num_processes": 8, "device": "lost ticks"},
        start | {"tick": 20, "num_processes": 4, "device": "B300"},
    ]
    (run / "environment.jsonl").write_text("".join(json.dumps(each) + "\n" for each in starts) + "torn")
    read = read_run(str(run))
    assert read.device_seconds == 20 * 0.5 * 2 + 40 * 0.5 * 4
    assert read.seconds_step == 1.0
    assert read.unreadable == 1
    row = re.search(
        r"<td>a</td><td>30</td><td>240</td><td>1</td><td>0 min 30 s</td><td>0.03</td><td>–</td>", cost_table([read])
    )
    assert row
    section = environment_table([read])
    assert "<td>2 x H200</td><td>fsdp2</td>" in section
    assert html.escape(f"train_t2i 0.1.0, Python 3.11.9, torch 2.12.1, {NASTY} 1") in section


def test_older_runs_do_not_say_what_they_ran_on(story):
    runs = [read_run(run) for run in story[1]]
    assert not environment_table(runs)
    assert "<td>all</td><td></td><td></td><td></td><td>1 min 00 s</td><td>–</td><td></td>" in cost_table(runs)


def test_a_start_says_what_it_runs_on():
    told = environment(torch.device("cpu"), 2, "ddp", 7)
    assert (told["num_processes"], told["backend"], told["tick"]) == (2, "ddp", 7)
    assert told["packages"]["torch"] == version("torch")
    assert told["device"].startswith("CPU, ")
    said = json.dumps(told)
    assert socket.gethostname() not in said
    assert str(Path.home()) not in said


# -- in a browser ----------------------------------------------------------------------------------------------------


def test_the_slider_shows_one_sheet_of_a_run(browser, story):
    root, runs = story
    report(root, runs)
    with opened_page(browser, root / "report" / "index.html") as (tab, _):
        cold = tab.locator(".timeline").first
        shown = cold.locator(".sheets figure:visible img")
        assert [shown.nth(i).get_attribute("alt") for i in range(shown.count())] == ["samples at step 30"]
        cold.locator("input").focus()
        tab.keyboard.press("ArrowLeft")
        assert shown.get_attribute("alt") == "samples at step 0"
        assert cold.locator("output").inner_text() == "step 0"
        assert tab.locator(".timeline").nth(1).locator(".sheets figure:visible img").count() == 1
        cold.locator("button").click()
        assert shown.count() == 2
        colour = "getComputedStyle(document.querySelectorAll('.card')[1]).borderTopColor"
        assert tab.evaluate(colour) == "rgb(200, 85, 61)"
    with opened_page(browser, root / "report" / "index.html", java_script_enabled=False) as (tab, _):
        assert tab.locator(".sheets figure:visible").count() == 4
        assert tab.locator(".slider:visible").count() == 0


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(tmp_path, capsys):
    run = str(write_run(tmp_path, "a", last=3))
    for arguments, said in (
        ([], "no run to report on"),
        ([str(tmp_path)], "not a run folder"),
        ([run, "--table", str(tmp_path / "none.json")], "no such file"),
        ([run, "--table", run + "/args.json"], "not a table of models"),
        ([run, "--out", run + "/args.json"], "--out"),
        ([run, "--max-sheets", "0"], "at least 1"),
    ):
        assert main(["report", *arguments]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err


def test_a_sheet_that_is_torn_is_named(story, capsys):
    root, runs = story
    (root / "cold" / "samples" / "step 30" / "grid.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    assert main(["report", *runs, "--out", str(root / "report")]) == 2
    err = capsys.readouterr().err
    assert "grid.png: cannot be read" in err
    assert "Traceback" not in err


def test_a_run_without_logs_or_samples_still_has_a_page(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "args.json").write_text('{"method": "dmdr"}')
    Page(report(tmp_path, [str(tmp_path / "new")]))
