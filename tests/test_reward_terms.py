"""Every reward in a loss: how flags ask for it, what it adds to the loss, and how many images it sees at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from reward_towers import PROMPTS, random_images
from tiny_runs import refused

import rewards
from rewards import REWARDS, TOWERS
from rewards.random_weights import write
from rewards.tower import CosineReward
from rewards.user import UserReward
from shapes.bait import saturation
from train_t2i.config import DMDRConfig
from train_t2i.errors import EXIT_USER, UserError
from train_t2i.methods.dmdr import reward_losses
from train_t2i.reward_flags import COLUMN_OF, WantedReward, wanted_rewards
from train_t2i.reward_terms import build_terms

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    return {name: write(name, root / name) for name in REWARDS}


def asked(extra: str, **more) -> DMDRConfig:
    return replace(DMDRConfig(), extra_rewards=extra, **more)


# -- flags -----------------------------------------------------------------------------------------------------------


def test_a_list_says_weight_name_and_path():
    found = wanted_rewards(asked("0.3*pickscore=a/b=c*d.pt, 2*my.rewards:taste.of", extra_reward_margin=2.0))
    assert found == (
        WantedReward("pickscore", "a/b=c*d.pt", 0.3, 2.0),
        WantedReward("my.rewards:taste.of", None, 2.0, 2.0),
    )
    assert [one.column for one in found] == ["pickscore", "taste_of"]


def test_clip_and_hps_come_first_with_their_own_margin():
    flags = {"clip_reward_model": "c", "hpsv2_reward_model": "h", "reward_hps_weight": 0.0, "reward_margin": 0.9}
    found = wanted_rewards(asked("1*aesthetic=a", **flags))
    assert [(one.column, one.weight, one.margin, one.prefix) for one in found] == [
        ("clip", 0.3, 0.9, ""),
        ("hps", 0.0, 0.9, "Realistic photo"),
        ("aesthetic", 1.0, None, ""),
    ]


@pytest.mark.parametrize("given", ["pickscore=a", "x*pickscore=a", "-1*pickscore=a", "inf*a:b", "1*pickscore", "1*=a"])
def test_another_list_is_refused(given, capsys):
    assert f"--extra-rewards {given}: not WEIGHT*NAME=PATH" in refused(capsys, "train", f"--extra-rewards={given}")


@pytest.mark.parametrize("given", ["1*pickscore=a,2*pickscore=b", "1*a:taste,1*b:taste", "1*clip=a"])
def test_what_is_asked_for_twice_is_refused(given):
    with pytest.raises(UserError, match="is given twice"):
        wanted_rewards(asked(given, clip_reward_model="c"))


# -- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_without_a_margin_the_loss_is_less_the_score(name, folders):
    (term,) = build_terms(asked(f"0.5*{name}={folders[name]}"), torch.float32, CPU, False, 0)
    images = random_images(3, 32, 32).requires_grad_()
    scores, loss = reward_losses(term, images, list(PROMPTS[:3]), tick=0)
    expected = REWARDS[name](folders[name])(images, PROMPTS[:3])
    assert (term.name, term.weight) == (COLUMN_OF.get(name, name), 0.5)
    assert torch.equal(scores, expected)
    assert torch.equal(loss, -expected)
    (mine,) = torch.autograd.grad(loss.sum(), images)
    (theirs,) = torch.autograd.grad(-expected.sum(), images)
    assert torch.equal(mine, theirs)
    assert mine.abs().max() > 0


def test_a_margin_ends_it():
    config = asked("1*shapes.bait:saturation", extra_reward_margin=0.5)
    (term,) = build_terms(config, torch.float32, CPU, False, 0)
    images = torch.rand(4, 3, 8, 8)
    images[:2] *= 0.1  # grey as night; the others are pushed no further
    images[2:] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    images.requires_grad_()
    _, loss = reward_losses(term, images, ["x"] * 4, tick=0)
    assert torch.equal(loss, (0.5 - saturation(images, [])).relu())
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert [bool(row.any()) for row in gradient] == [True, True, False, False]


# -- runs ------------------------------------------------------------------------------------------------------------


def test_every_reward_trains(trainer, folders):
    extra = ",".join(f"0.1*{name}={folder}" for name, folder in folders.items())
    run = trainer.run("run", f"--cold-start-iter 0 --extra-rewards {extra} --max-train-steps 1")
    (line,) = tiny.log_lines(run, "generator")
    columns = [COLUMN_OF.get(name, name) for name in REWARDS]
    assert [key for key in line if key.startswith("reward_")] == [f"reward_{column}" for column in columns]
    assert line["loss"] == pytest.approx(
        line["loss_dmd"] - 0.1 * sum(line[f"reward_{column}"] for column in columns), rel=1e-5
    )
    told = (run / "log.txt").read_text()
    assert all(f"reward {column}: {folders[name]}" in told for name, column in zip(REWARDS, columns))


def test_what_cannot_be_built_is_told_before_it_trains(trainer, folders):
    ended = trainer.ends("run", f"--cold-start-iter 0 --extra-rewards 1*pickscore={folders['pickscore']}-gone")
    assert (ended.code, "pickscore-gone" in ended.err, "Traceback" in ended.err) == (EXIT_USER, True, False)


def test_the_first_that_is_watched_tells_images_apart(trainer, folders):
    watched = f"aesthetic={folders['aesthetic']},clip={folders['clip']}"
    ended = trainer.ends("run", f"--sample-steps 1 --monitor-rewards {watched}")
    assert ended.code == EXIT_USER
    assert "--monitor-rewards aesthetic: has no features of images" in ended.err


@pytest.mark.parametrize("name", REWARDS)
def test_towers_are_those_with_features_of_images(name, folders):
    assert (name in TOWERS) == isinstance(REWARDS[name](folders[name]), CosineReward)


# -- functions of one's own -------------------------------------------------------------------------------------------


def test_a_function_that_is_no_reward_is_told():
    images, prompts = torch.rand(3, 3, 4, 4, requires_grad=True), ["a", "b", "c"]
    wrong = {
        "returned (3, 3)": lambda images, prompts: images.mean(dim=(2, 3)),
        "returned float": lambda images, prompts: 0.5,
        "returned scores without a gradient": lambda images, prompts: images.detach().mean(dim=(1, 2, 3)),
        "failed (KeyError: 'x')": lambda images, prompts: {}["x"],
    }
    for said, function in wrong.items():
        with pytest.raises(rewards.RewardError) as told:
            UserReward("my:own", function, torch.device("cpu"))(images, prompts)
        assert f"my:own: {said}" in str(told.value)
    extra = rewards.find("shapes.bait:saturation")(None)
    (gradient,) = torch.autograd.grad(extra(images, prompts).sum(), images)
    assert gradient.sum(dim=1).abs().max() < 1e-6  # what the largest colour gains, the smallest loses
    assert float(gradient.abs().sum()) == pytest.approx(2 * 3, rel=1e-5)
    with torch.no_grad():
        assert extra(images, prompts).shape == (3,)
