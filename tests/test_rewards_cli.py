"""``python -m rewards``: scores in JSON, and one line for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_towers import PROMPTS

from rewards import REWARDS
from rewards.__main__ import main
from rewards.random_weights import write

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(40, 40), (40, 40), (40, 40), (30, 50), (40, 40)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of every reward, five pictures of two sizes, and their prompts."""
    root = tmp_path_factory.mktemp("cli")
    for name in REWARDS:
        write(name, root / name)
    for index, size in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    return root


def pictures(world: Path) -> list[str]:
    return [str(world / f"{index}.png") for index in range(len(SIZES))]


def tensors(world: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None].float() / 255 for p in pictures(world)]


@pytest.mark.parametrize("name", REWARDS)
def test_scores_are_those_of_single_calls(name: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of two, broken where the size changes, in the order of the pictures."""
    prompts = [] if name == "aesthetic" else ["--prompts", str(world / "prompts.txt")]
    arguments = ["--reward", name, "--weights", str(world / name), "--batch-size", "2", *prompts]
    assert main(["score", *pictures(world), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    reward = REWARDS[name](world / name)
    expected = [float(reward(image, [prompt])[0]) for image, prompt in zip(tensors(world), PROMPTS)]
    assert [row["score"] for row in found["scores"]] == pytest.approx(expected, abs=2e-5)
    assert [row["image"] for row in found["scores"]] == pictures(world)
    assert [row["prompt"] for row in found["scores"]] == (PROMPTS if prompts else [""] * 5)
    assert (found["reward"], found["count"], found["dtype"]) == (name, 5, "float32")
    assert found["mean"] == pytest.approx(sum(expected) / 5, abs=2e-5)
    file = REWARDS[name].inspect(world / name).files[0]
    assert found["sha256"][Path(file).name] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert found["how"] == REWARDS[name].inspect(world / name).choices


def test_choices_reach_the_reward(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        pictures(world)[3],
        "--reward",
        "hpsv2",
        "--weights",
        str(world / "hpsv2"),
        "--prompts",
        str(world / "one.txt"),
    ]
    (world / "one.txt").write_text("a cat\n")
    flags: list[list[str]] = [
        [], ["--antialias", "false"], ["--resize-mode", "squash"], ["--quick-gelu", "true"], ["--logit-scale", "true"],
        ["--dtype", "bfloat16"],
    ]  # fmt: skip
    scores = []
    for flag in flags:
        assert main(["score", *common, *flag]) == 0
        scores.append(json.loads(capsys.readouterr().out)["mean"])
    assert len(set(scores)) == len(flags)
    assert scores[4] == pytest.approx(100 * scores[0], rel=1e-4)
    assert main(["inspect", *common[1:5], "--resize-mode", "squash"]) == 0
    assert "squash" in capsys.readouterr().out


def test_it_runs_as_a_program_with_a_function_of_ones_own(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def light(images, prompts):\n    return images.mean((1, 2, 3))\n")
    command = [
        sys.executable,
        "-m",
        "rewards",
        "score",
        *pictures(world),
        "--reward",
        "mine:light",
        "--out",
        "out.json",
    ]
    command += ["--prompts", str(world / "prompts.txt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    expected = [float(image.mean()) for image in tensors(world)]
    assert [row["score"] for row in found["scores"]] == pytest.approx(expected, abs=1e-6)
    assert found["sha256"] == {}


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such reward": (["--reward", "pikscore"], "pikscore: is no reward; the rewards are clip"),
    "no weights": (["--weights", ""], "needs weights"),
    "weights that are not there": (["--weights", "{world}/absent.pt"], "absent.pt: there is no such file"),
    "weights of another reward": (["--weights", "{world}/imagereward/ImageReward.pt"], "ImageReward.pt: has no tensor"),
    "another digest": (["--sha256", "00ff"], "has not the sha256 00ff"),
    "no prompts": (["--prompts", "{world}/absent.txt"], "absent.txt: there is no such file"),
    "too few prompts": (["--prompts", "{world}/few.txt"], "few.txt: has 2 lines for 5 pictures"),
    "prompts that are no text": (["--prompts", "{world}/0.png"], "0.png: cannot be read as UTF-8"),
    "a device that is not here": (["--device", "cuda:77"], "--device cuda:77: cannot be used"),
    "a device that is none": (["--device", "gpu"], "--device gpu: cannot be used"),
    "an empty batch": (["--batch-size", "0"], "--batch-size: is 0"),
    "nowhere to write": (["--out", "{world}/absent/out.json"], "out.json: cannot be written"),
    "a folder to write to": (["--out", "{world}"], "cannot be written"),
    "a choice it has not": (["--reward", "imagereward", "--logit-scale", "true"], "imagereward has no logit_scale"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(mistake: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "few.txt").write_text("a\nb\n")
    flags, message = MISTAKES[mistake]
    given = {"--reward": "clip", "--weights": str(world / "clip"), "--prompts": str(world / "prompts.txt")}
    given |= {flags[i]: flags[i + 1].format(world=world) for i in range(0, len(flags), 2)}
    one_line(["score", *pictures(world), *(word for pair in given.items() for word in pair)], message, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such picture"),
        (b"GIF", "is no picture"),
        (b"", "is no picture"),
        ("cut", "is a damaged picture"),
    ],
)
def test_a_picture_that_cannot_be_read_is_never_left_out(
    content: bytes | str | None, message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.png"
    if content == "cut":
        wrong.write_bytes((world / "0.png").read_bytes()[:2000])
    elif content is not None:
        wrong.write_bytes(content)  # type: ignore[arg-type]
    images = [*pictures(world)[:4], str(wrong)]
    flags = ["--reward", "clip", "--weights", str(world / "clip"), "--prompts", str(world / "prompts.txt")]
    one_line(["score", *images, *flags], f"wrong.png: {message}", capsys)


def one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert "; " in said.err  # what to do


def test_prompts_are_asked_for_where_they_are_read(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(
        ["score", *pictures(world), "--reward", "clip", "--weights", str(world / "clip")],
        "--prompts: is missing",
        capsys,
    )


def test_what_a_camera_turned_is_turned_back(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.open(world / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    scores = []
    for file in (world / "3.png", tmp_path / "turned.png"):
        assert main(["score", str(file), "--reward", "aesthetic", "--weights", str(world / "aesthetic")]) == 0
        scores.append(json.loads(capsys.readouterr().out)["mean"])
    assert scores[0] == scores[1]


def test_the_benchmark_makes_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches keep one gradient the size of the pictures."""
    flags = ["--rewards", "imagereward", "--batch-size", "4", "--micro-batch", "2", "--resolution", "32"]
    assert main(["benchmark", *flags]) == 0
    head, _, plain, cheap = capsys.readouterr().out.splitlines()
    assert head.count("|") == plain.count("|") == cheap.count("|")
    kept = [float(line.split("|")[-2]) for line in (plain, cheap)]
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["pickscore", "imagereward", "aesthetic"])
def test_published_shapes_score_and_have_a_gradient(name: str, tmp_path: Path) -> None:
    """Random weights of the true shapes, 2 to 4 GB in fp32."""
    reward = REWARDS[name](write(name, tmp_path, small=False))
    images = torch.rand(1, 3, 160, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = reward(images, ["a lighthouse at dusk"])
    score.sum().backward()
    assert score.isfinite().all()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.any()
