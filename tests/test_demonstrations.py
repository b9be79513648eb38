"""The scripts that make whole tables: each of their training stages is a run that the trainer takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_scripts import ROOT, launched

from train_t2i import cli
from train_t2i.config import Settings

NOTHING_IS_MADE = {"BASH_FUNC_mv%%": "() { :; }"}  # so that there is nothing to move


def stages(script: str, root: Path, **environment: str) -> dict[str, Settings]:
    """Stage -> what its launcher would start the trainer with."""
    path = str(ROOT / "scripts" / f"{script}.sh")
    done = launched([path], root, WORK=str(root / "work"), **NOTHING_IS_MADE, **environment)
    assert done.returncode == 0, done.stderr
    found = {}
    for part in done.stdout.split("== ")[1:]:
        name, *words = part.splitlines()
        if words[:3] == ["-m", "train_t2i", "train"]:
            found[name] = cli.parse(words[3:])
    return found


@pytest.mark.parametrize(
    ("script", "count"), [("quickstart", 3), ("reproduce", 20), ("families", 12), ("edits", 2), ("ablations", 11)]
)
def test_every_stage_is_a_valid_run(script: str, count: int, tmp_path: Path) -> None:
    found = stages(script, tmp_path)
    assert len(found) == count
    assert len({settings.run.exp_name for settings in found.values()}) == count


def test_the_guard_is_shown_as_its_page_says(tmp_path: Path) -> None:
    """docs/rewards_watch.md: the recipe, then saturation alone under each guard, all from one cold start."""
    found = stages("guard_demo", tmp_path, QUICK="1", BAIT="7")
    assert [*found] == ["ode", "cold", "recipe", "bait-warn", "bait-scale", "bait-stop"]
    guarded = [found[name] for name in [*found][2:]]
    assert [settings.method.reward_guard for settings in guarded] == ["warn", "warn", "scale", "stop"]
    assert [settings.method.extra_rewards for settings in guarded] == ["", *["7*shapes.bait:saturation"] * 3]
    assert [bool(settings.method.hpsv2_reward_model) for settings in guarded] == [True, False, False, False]
    assert {settings.run.resume_ckpt for settings in guarded} == {
        str(tmp_path / "work" / "cold" / "checkpoints" / "torch_units" / "step-12.pt")
    }
    for settings in guarded:
        assert settings.method.monitor_rewards.endswith("tiny-clip-heldout")
        assert settings.run.checkpoint_steps == settings.run.sample_steps  # a good checkpoint is one that was read
