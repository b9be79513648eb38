"""The report: what it reads, what it draws, and that its page is whole, offline and safe."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from train_t2i.__main__ import main
from train_t2i.report_data import offsets, read_run, spread, thin
from train_t2i.report_page import card
from train_t2i.report_plots import smooth

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

    VOID = ("meta", "img", "br")

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
    assert "script" not in names
    assert "link" not in names
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
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
    report(root, runs[:1])  # without rewards
    assert not (root / "report" / "plots" / "rewards.png").exists()


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


def test_a_run_without_logs_or_samples_still_has_a_page(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "args.json").write_text('{"method": "dmdr"}')
    Page(report(tmp_path, [str(tmp_path / "new")]))
