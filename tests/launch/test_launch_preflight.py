"""Every problem of every node at once, before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_nodes import ROOT, Fake

from train_t2i.launch import nodes, outcome, preflight, probe

STARTED = "touch started-$MACHINE_RANK"
GOOD: dict[str, Any] = {
    "python": [3, 11], "gpus": 8, "missing": [], "address": "", "port": "", "folder": True, "script": True,
    "activated": True, "code": {"a.py": "1", "b.py": "2"}, "rehearsal": None, "data": None, "data_path": None,
}  # fmt: skip


def rows(fake: Fake) -> list[list[str]]:
    """Node, check, found, way out; without the heading."""
    lines = [line for line in fake.err.splitlines() if line.startswith("node ")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines][1:]


def launch_of(*flags: str, **variables: str) -> nodes.Launch:
    return nodes.read(flags, {"MASTER_ADDR": "a", "WORKER_NODES": "b c"} | variables)


def answers(launch: nodes.Launch, **changed: Any) -> list[preflight.Answer]:
    """All nodes are well, but for what is changed on the second."""
    now = time.time()
    found = [{**GOOD, "clock": now, **(changed if node.rank == 1 else {})} for node in launch.nodes]
    return [preflight.Answer(n, f, "", False, now - 1, now + 1) for n, f in zip(launch.nodes, found, strict=True)]


def test_all_problems_at_once_and_nothing_starts(fake: Fake) -> None:
    """An unreachable node, a port that is taken, an environment without packages."""
    fake.script(STARTED)
    (fake.root / "activate").write_text("return 1\n")
    with socket.socket() as server:
        server.bind(("", int(fake.variables["MASTER_PORT"])))
        server.listen()
        code = fake.run("--data-path-train", "none.txt", WORKER_NODES="worker unreachable")
    assert code == 2
    assert fake.err.splitlines()[-2:] == [
        f"error: {len(rows(fake))} problems on 3 of 3 nodes; nothing was started", "hint: see the last column above",
    ]  # fmt: skip
    found = {(row[0], row[1]): row[2] for row in rows(fake)}
    assert "Address already in use" in found["node 0 (localhost)", "master port"]
    assert "No route to host" in found["node 2 (unreachable)", "reachable"]
    for node in ("node 0 (localhost)", "node 1 (worker)"):
        assert "cannot be activated" in found[node, "environment"]
        assert found[node, "data"] == "none.txt is not there"
    assert all(len(row) == 4 for row in rows(fake))  # with a way out
    assert not list(fake.folder.glob("started-*"))


def other_node(fake: Fake) -> tuple[Path, dict[str, str]]:
    """The worker's own folder, a copy of the master's."""
    other = fake.root / "other"
    shutil.copytree(fake.folder, other, dirs_exist_ok=True)
    return other, {"FAKE_FOLDER_OF_worker": str(other)}


def test_other_code_and_other_data_are_found(fake: Fake) -> None:
    package = fake.folder / "train_t2i"
    package.mkdir()
    for name in ("__init__.py", "a.py", "b.py", "c.py"):
        (package / name).write_text("1\n")
    (fake.folder / "prompts.txt").write_text("a cat\n")
    fake.script(STARTED)
    other, variables = other_node(fake)
    assert fake.run("--data-path-train", "prompts.txt", **variables) == 0, fake.err
    assert (other / "started-1").exists()
    (other / "started-1").unlink()
    for name in ("a.py", "b.py"):
        (other / "train_t2i" / name).write_text("2\n")
    (other / "train_t2i" / "c.py").unlink()
    (other / "prompts.txt").write_text("a dog\n")
    assert fake.run("--data-path-train=prompts.txt", **variables) == 2
    code, data = rows(fake)
    assert code[:3] == [
        "node 1 (worker)", "same code", "train_t2i/a.py, train_t2i/b.py and 1 more differ from node 0 (localhost)",
    ]  # fmt: skip
    assert data[:2] == ["node 1 (worker)", "same data"]
    assert not (other / "started-1").exists()


@pytest.mark.parametrize(
    ("changed", "check", "named"),
    [
        ({"folder": False, "script": False, "code": None}, "folder", "is not there"),
        ({"script": False, "code": None}, "script", "dmdr_sdxl_refl.sh"),
        ({"activated": False}, "environment", "/conda/bin/activate dmdr"),
        ({"missing": ["torch"]}, "packages", "without torch"),
        ({"python": [3, 9]}, "packages", "Python 3.9"),
        ({"gpus": 7}, "GPUs", "7, needs 8"),
        ({"port": "Address already in use"}, "master port", "29500"),
        ({"address": "Name or service not known"}, "master address", "a: Name"),
        ({"clock": 0.0}, "clock", "s from the master's"),
        ({"code": {"a.py": "1", "b.py": "3"}}, "same code", "b.py differ from node 0 (a)"),
        ({"rehearsal": {"said": "error: --x: unknown flag", "settings": None}}, "settings", "--x: unknown"),
        ({"data_path": "p.txt"}, "data", "p.txt is not there"),
    ],
)
def test_each_problem_is_named_with_its_node(changed: dict[str, Any], check: str, named: str) -> None:
    launch = launch_of()
    (problem,) = preflight.problems_of(launch, answers(launch, **changed))
    assert (problem.node.rank, problem.check) == (1, check)
    assert named in problem.found
    assert problem.way_out


def test_well_nodes_have_no_problem() -> None:
    launch = launch_of()
    assert preflight.problems_of(launch, answers(launch)) == []


def test_a_cpu_launch_needs_no_gpu() -> None:
    launch = launch_of(ACCELERATE_USE_CPU="true")
    assert preflight.problems_of(launch, answers(launch, gpus=0)) == []


@pytest.mark.parametrize(("off_s", "count"), [(3, 0), (-3, 0), (9, 1), (-9, 1)])
def test_clocks_may_differ_by_five_seconds(off_s: float, count: int) -> None:
    launch = launch_of()
    assert len(preflight.problems_of(launch, answers(launch, clock=time.time() + off_s))) == count


def test_a_variable_that_stayed_on_the_master_is_found() -> None:
    launch = launch_of()
    settings = {"batch_size": 4, "seed": 30}
    found = answers(launch, rehearsal={"said": "", "settings": settings | {"seed": 31}})
    found[0].found["rehearsal"] = {"said": "", "settings": settings}
    (problem,) = preflight.problems_of(launch, found)
    assert problem.check == "same settings"
    assert problem.found == "seed 31, on node 0 (a) 30"


def test_data_that_the_launcher_makes_may_be_missing() -> None:
    assert preflight.problems_of(launch_of(TINY="1"), answers(launch_of(), gpus=8, data_path="p.txt")) == []
    named = launch_of("--data-path-train", "p.txt", TINY="1")
    assert len(preflight.problems_of(named, answers(named, data_path="p.txt"))) == 1


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--data-path-train", "a"], "a"), (["--data_path_train=a"], "a"), (["--data-path-train=a", "--data-path-train", "b"], "b"),
        (["--data-path-train"], None), (["--x", "a"], None),
    ],
)  # fmt: skip
def test_the_data_that_a_flag_names(flags: list[str], value: str | None) -> None:
    assert preflight.data_flag(flags) == value


def test_a_node_that_prints_more_is_understood(fake: Fake) -> None:
    """A login shell's greeting, before and after; an activate script that talks."""
    (fake.root / "activate").write_text("echo welcome; " + (fake.root / "activate").read_text())
    fake.script(STARTED)
    assert fake.run() == 0, fake.err
    assert preflight.answer_of(b'hello\ntrain_t2i-probe {"a": 1}\nbye\n') == {"a": 1}
    assert preflight.answer_of(b"hello\n") is None


@pytest.mark.parametrize("visible", [("0,1,3", 3), ("", 0), ("0,-1,2", 1)])
def test_gpus_are_those_that_are_visible(visible: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible[0])
    assert probe.gpus() == visible[1]


def test_the_probe_runs_on_an_old_python() -> None:
    """A node without its environment has the system's: no syntax of a newer Python, and no package."""
    import ast

    ast.parse((ROOT / "train_t2i" / "launch" / "probe.py").read_text(), feature_version=(3, 6))


def test_a_data_folder_is_compared_by_its_table_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("a")
    (tmp_path / "x").write_text("1")
    first = probe.data_of(tmp_path)
    (tmp_path / "x").write_text("22")
    second = probe.data_of(tmp_path)
    (tmp_path / "metadata.csv").write_text("b")
    assert len({json.dumps(found) for found in (first, second, probe.data_of(tmp_path))}) == 3
    assert probe.data_of(tmp_path / "none") is None


def test_data_of_several_files_and_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert probe.data_named(str(tmp_path / "a.txt")) == probe.data_of(tmp_path / "a.txt")
    both = probe.data_named(f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'}")
    assert both == probe.data_named(str(tmp_path / "*.txt"))
    assert both["bytes"] == 2
    (tmp_path / "b.txt").write_text("c")
    assert probe.data_named(str(tmp_path / "*.txt")) != both
    assert probe.data_named(f"{tmp_path / 'a.txt'},{tmp_path / 'none'}") is None
    assert probe.data_named("hub:org/name")


def test_the_checkouts_own_scripts_are_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that train would get, and with them the run's folder; mistakes in flags are found before anything starts."""
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = str(ROOT / "scripts" / "multi_node" / "cold_start_sdxl_4step.sh")
    found = probe.rehearse(
        script, ["--output-dir", str(tmp_path), "--exp-name", "a: b"], {"TINY": "1", "NUM_MACHINES": "3"}
    )
    assert found["settings"]["data_path_train"] == "runs/prompts.txt"
    launch = launch_of()
    answer = preflight.Answer(launch.nodes[0], {**GOOD, "rehearsal": found}, "", False, 0, 0)
    assert preflight.marker_of(launch, answer) == tmp_path / "a: b" / ".exit_code"
    wrong = probe.rehearse(script, ["--no-such-flag"], {"TINY": "1"})
    assert wrong == {"said": "error: --no-such-flag: unknown flag", "settings": None}


def test_another_script_is_not_rehearsed(tmp_path: Path) -> None:
    """It might not know --dry-run."""
    (tmp_path / "run.sh").write_text("touch started\n")
    assert probe.rehearse(str(tmp_path / "run.sh"), [], dict(os.environ)) is None
    assert not (tmp_path / "started").exists()


# -- how a launch ended ----------------------------------------------------------------------------------------------


class Ended:
    def __init__(self, code: int) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("codes", "failed", "signal_number", "said", "code"),
    [
        ([0, 0], [], 0, None, 0),
        ([0, 0], [], 15, 0, 0),  # it was done before the signal came
        ([1, 1], [], 15, 75, 75),  # launchers wrap codes
        ([75, 75], [], 15, None, 75),
        ([75, 0], [], 15, None, 75),
        ([1, 75], [], 15, None, 143),
        ([137, 137], [], 2, None, 130),
        ([1, 1], [1, 0], 0, 4, 4),
        ([1, 143], [0], 0, None, 1),
        ([3, 1], [1], 0, None, 1),
        ([1, 1], [0], 0, -1, 1),  # a bug
        ([1, 0], [0], 0, 0, 1),  # the master ended well, another node did not
        ([1, 1], [0, 1], 0, 75, 75),  # a worker's machine was shut down
    ],
)
def test_the_exit_code(codes: list[int], failed: list[int], signal_number: int, said: int | None, code: int) -> None:
    members = [Ended(code) for code in codes]
    assert outcome.exit_code(members, [members[i] for i in failed], signal_number, said) == code


def test_an_old_marker_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / ".exit_code"
    file.write_text("75\n")
    marker = outcome.Marker(file)
    assert marker.code() is None
    file.unlink()
    assert marker.code() is None
    time.sleep(0.01)
    file.write_text("75\n")
    assert marker.code() == 75
    file.write_text("half")
    assert marker.code() is None
    assert outcome.Marker(None).code() is None
