"""The quickstart, shrunk: every stage really runs, the table has its columns, a second run does nothing again."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("network_calls", "adherence", "clip", "hps", "held_out", "frechet", "recall", "ms_per_image")


def quickstart(work: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"QUICK": "1", "WORK": str(work), "VIRTUAL_ENV": sys.prefix}
    script = ROOT / "scripts" / "quickstart.sh"
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_from_pairs_to_report(tmp_path: Path) -> None:
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["model"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert list(rows) == ["teacher", "ode-1", "cold-1", "dmdr-1"]
    assert all(math.isfinite(row[key]) for row in rows.values() for key in COLUMNS)
    assert rows["teacher"]["network_calls"] == 50
    assert {rows[name]["network_calls"] for name in ("ode-1", "cold-1", "dmdr-1")} == {1}
    assert rows["teacher"]["adherence"] > 0.85
    page = (tmp_path / "report" / "index.html").read_text()
    assert "dmdr-1" in page
    again = quickstart(tmp_path)
    assert again.returncode == 0
    made = re.findall(r"^== (\S+): \d+ s$", done.stdout, re.MULTILINE)
    assert len(made) > 5
    assert re.findall(r"^== (\S+): already done$", again.stdout, re.MULTILINE) == made


# -- stages, with a command that makes nothing -----------------------------------------------------------------------


def stage(work: Path, command: str, before: str = ":", **environment: str) -> subprocess.CompletedProcess[str]:
    """A stage named "made" that says what it does."""
    script = f"source {shlex.quote(str(ROOT / 'scripts' / 'tiny_world.sh'))}; {before}; stage made {command}; echo end"
    settings = os.environ | {"WORK": str(work), "VIRTUAL_ENV": sys.prefix} | environment
    return subprocess.run(["bash", "-c", script], env=settings, capture_output=True, text=True, check=False)


def test_a_finished_stage_is_skipped_and_its_mark_begins_with_its_seconds(tmp_path: Path) -> None:
    assert "\nrun 1\n" in stage(tmp_path, "echo run 1").stdout
    again = stage(tmp_path, "echo run 1")
    assert again.stdout.splitlines() == ["== made: already done", "end"]
    assert (tmp_path / ".done" / "made").read_text().splitlines()[0].isdigit()


def test_a_stage_made_with_another_recipe_is_refused(tmp_path: Path) -> None:
    """Its command, its settings, the files of its recipe and the tiny models; nothing is run and nothing removed."""
    recipe, models = tmp_path / "recipe.sh", tmp_path / "tiny-recipes.json"
    recipe.write_text("setting seed 30\n")
    models.write_text('{"sd3": {"digest": "1"}}\n')
    use = f"RECIPE=({recipe}); CHECKPOINTS={tmp_path}"
    work = tmp_path / "work"
    assert stage(work, "echo run 1", use).returncode == 0
    mark = (work / ".done" / "made").read_text()
    different = [stage(work, "echo run 2", use), stage(work, "echo run 1", use, EVALUATION_PROMPTS="100")]
    recipe.write_text("# a comment\nsetting seed 30\n")
    assert stage(work, "echo run 1", use).returncode == 0
    models.write_text('{"sd3": {"digest": "2"}}\n')
    different.append(stage(work, "echo run 1", use))
    models.write_text('{"sd3": {"digest": "1"}}\n')
    recipe.write_text("setting seed 31\n")
    different.append(stage(work, "echo run 1", use))
    for done in different:
        assert (done.returncode, done.stdout) == (2, "")
        assert "made with other settings or another recipe" in done.stderr.splitlines()[0]
        assert str(work) in done.stderr.splitlines()[1]
    assert (work / ".done" / "made").read_text() == mark


def test_a_folder_that_moved_and_another_interpreter_are_the_same_recipe(tmp_path: Path) -> None:
    command = 'echo "$WORK/pairs" "$PYTHON"'
    assert stage(tmp_path / "here", command).returncode == 0
    (tmp_path / "here").rename(tmp_path / "there")
    assert "already done" in stage(tmp_path / "there", command, "PYTHON=/elsewhere/python").stdout


@pytest.mark.parametrize(("quick", "folder"), [("0", "quickstart"), ("1", "quickstart-quick")])
def test_the_quick_one_has_a_folder_of_its_own(quick: str, folder: str, tmp_path: Path) -> None:
    """Stopped at its first program, which is none."""
    settings = {key: value for key, value in os.environ.items() if key != "WORK"}
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text("#!/usr/bin/env bash\n[[ $1 == - ]]\n")  # setup.sh asks it for the stack
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "quickstart.sh"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=settings | {"QUICK": quick, "VIRTUAL_ENV": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "== scenes\n", done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder]


FAMILY_STAGES = {
    "sd3": ["cold_start_sd3", "dmdr_sd3_refl", "evaluate-sd3"],
    "qwen_image": [
        "evaluate-teacher-qwen_image-2", "pairs-qwen_image",
        "direct_qwen_image_2step", "evaluate-direct_qwen_image_2step",
        "direct_qwen_image_4step", "evaluate-direct_qwen_image_4step", "merge-direct_qwen_image_4step",
        "cold_start_qwen_image_4step", "dmdr_qwen_image_4step_refl", "evaluate-qwen_image_4step",
        "cold_start_qwen_image_2step", "dmdr_qwen_image_2step_refl", "evaluate-qwen_image_2step",
    ],
}  # fmt: skip
TEACHERS = {"sd3": "tiny-sd3 --resolution 64 --text-length 32", "qwen_image": "tiny-qwen-image --resolution 64"}


@pytest.mark.parametrize(("family", "guidance"), [("sd3", 2), ("qwen_image", 3)])
def test_the_families_are_driven_by_the_bash_of_macos(family: str, guidance: int, tmp_path: Path) -> None:
    """Every stage of one, by a python that says what it is told; 3.2 knows no mapfile."""
    stub, old = tmp_path / "bin" / "python", tmp_path / "old.sh"
    stub.parent.mkdir()
    stub.write_text(
        '#!/usr/bin/env bash\n[[ $1 != - ]] || exit 0\necho "$*"\n[[ "${!#}" != *.part ]] || touch "${!#}"\n'
    )
    stub.chmod(0o755)
    old.write_text("enable -n mapfile readarray\n")
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "families.sh"], capture_output=True, text=True, check=False,
        env=os.environ | {"WORK": str(tmp_path), "FAMILIES": family, "VIRTUAL_ENV": str(tmp_path), "BASH_ENV": str(old)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^== (\S+): \d+ s$", done.stdout, re.MULTILINE)
    assert stages == ["scenes", f"evaluate-teacher-{family}", *FAMILY_STAGES[family], "report"]
    teacher = f"--pretrained-model {ROOT}/checkpoints/{TEACHERS[family]}"
    assert f"evaluate --teacher {teacher} --teacher-num-steps 25 --teacher-cfg {guidance} " in done.stdout


def test_every_method_has_a_cell_of_its_own(tmp_path: Path) -> None:
    """Every stage of one family, by a python that says what it is told and finds that twelve steps fit anywhere."""
    stub, old = tmp_path / "bin" / "python", tmp_path / "old.sh"
    stub.parent.mkdir()
    stub.write_text(
        '#!/usr/bin/env bash\n[[ $1 != - ]] || exit 0\n[[ $2 != steps ]] || { echo 12; exit; }\necho "$*"\n'
        '[[ "${!#}" != *.part ]] || touch "${!#}"\n'
    )
    stub.chmod(0o755)
    old.write_text("enable -n mapfile readarray\n")
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "methods.sh", "flux"], capture_output=True, text=True, check=False,
        env=os.environ | {"WORK": str(tmp_path), "VIRTUAL_ENV": str(tmp_path), "BASH_ENV": str(old)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^flux: == (\S+): \d+ s$", done.stdout, re.MULTILINE)
    probed = [f"{probe}{cell}" for cell in ("direct-4", "arcflow-2") for probe in ("probe-flux-", "flux-")]
    for calls in "42":
        probed += [f"probe-flux-dmd-{calls}", f"flux-dmd-{calls}", f"flux-dmdr-{calls}-cold"]
        probed += [f"probe-flux-dmdr-{calls}", f"flux-dmdr-{calls}"]
    assert stages == ["evaluate-teacher-flux", "pairs-flux", *probed, "evaluate-flux"]
    rewards = next(line for line in done.stdout.splitlines() if "--exp-name=flux-dmdr-2 " in line)
    cold = tmp_path / "flux-dmdr-2-cold" / "checkpoints" / "torch_units" / "step-4.pt"
    assert f"--resume-ckpt={cold} " in rewards
    assert rewards.endswith("--sample-num-steps 2 --cold-start-iter 4 --reward-clip-weight 1 --max-train-steps 16")
    evaluated = next(line for line in done.stdout.splitlines() if "--name flux-arcflow-2,flux-direct-4," in line)
    assert f"evaluate {tmp_path}/flux-arcflow-2 {tmp_path}/flux-direct-4 {tmp_path}/flux-dmd-2 " in evaluated


@pytest.mark.parametrize(
    ("family", "seconds", "told"),
    [("sdx", "150", "error: unknown family sdx"), ("flux", "soon", "error: SECONDS_A_CELL=soon: not a count")],
)
def test_a_wrong_word_to_the_comparison_is_told_before_anything_is_made(
    family: str, seconds: str, told: str, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "methods.sh", family], capture_output=True, text=True, check=False,
        env=os.environ | {"WORK": str(work), "SECONDS_A_CELL": seconds},
    )  # fmt: skip
    assert done.returncode == 2
    assert told in done.stderr.splitlines()
    assert [path.name for path in work.iterdir()] == []
