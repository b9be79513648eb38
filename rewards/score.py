"""``python -m rewards score``: picture files and a file of prompts -> JSON.

    {"reward": "hpsv2", "weights": "/path/HPS_v2.1_compressed.pt", "sha256": {"HPS_v2.1_compressed.pt": "..."},
     "how": {"resize": "longest", "antialias": "antialiased", "activation": "GELU", "score": "cosine", "version": "v2.1"},
     "dtype": "float32", "count": 2, "mean": 0.28, "scores": [{"image": "a.png", "prompt": "a cat", "score": 0.27}, ...]}

A picture that is missing or cannot be read is an error, never left out of the mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from rewards import Choices, Reward, RewardError, find
from rewards.weights import sha256_of

MAX_PIXELS = 1 << 26  # of a picture, before it is decoded


def score(given: argparse.Namespace, choices: Choices) -> str:
    """What the command line asks for, as JSON; written to ``--out`` where that is given.  Raises RewardError."""
    builder = find(given.reward)
    if given.batch_size < 1:
        raise RewardError("--batch-size", f"is {given.batch_size}", "one picture at least is scored at a time")
    images = [Path(image) for image in given.images]
    for image in images:
        check_image(image)
    prompts = read_prompts(given.prompts, len(images), needed=builder.reads_prompts)
    if given.out is not None and not Path(given.out).parent.is_dir():
        raise RewardError(given.out, "cannot be written: its folder is not there", "make the folder first")
    report = builder.inspect(given.weights, choices)
    device = open_device(given.device)
    dtype = getattr(torch, given.dtype)
    reward = builder(given.weights, dtype=dtype, device=device, choices=choices, sha256=given.sha256)
    scores = score_files(reward, images, prompts, given.batch_size)
    rows = [{"image": str(i), "prompt": p, "score": s} for i, p, s in zip(images, prompts, scores)]
    found = {
        "reward": given.reward,
        "weights": report.path,
        "sha256": {Path(file).name: sha256_of(Path(file)) for file in report.files},
        "how": report.choices,
        "dtype": given.dtype,
        "count": len(rows),
        "mean": sum(scores) / len(scores),
        "scores": rows,
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if given.out is not None:
        try:
            Path(given.out).write_text(text + "\n", "utf-8")
        except OSError as error:
            raise RewardError(given.out, f"cannot be written ({error.strerror})", "choose another --out") from None
    return text


def open_device(name: str) -> torch.device:
    """The device of that name, tried.  Raises RewardError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"cannot be used ({str(error).splitlines()[0]})"
        raise RewardError(f"--device {name}", reason, "give cpu, or a device that torch finds here") from None
    return device


def read_prompts(path: str | None, count: int, *, needed: bool) -> list[str]:
    """A prompt a picture.  Raises RewardError."""
    if path is None:
        if needed:
            raise RewardError("--prompts", "is missing", "give a text file with the prompt of each picture on its line")
        return [""] * count
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise RewardError(path, "there is no such file", "check the path of --prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(path, f"cannot be read as UTF-8 text ({error})", "save it as UTF-8") from None
    if len(lines) != count:
        reason = f"has {len(lines)} lines for {count} pictures"
        raise RewardError(path, reason, "each picture needs its own line, in the order of the pictures")
    return lines


def check_image(path: Path) -> None:
    """Looks at a picture's header.  Raises RewardError."""
    hint = "give PNG, JPEG, WebP or another picture that PIL reads"
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except FileNotFoundError:
        raise RewardError(path, "there is no such picture", "check the path") from None
    except Exception as error:  # PIL raises anything on damaged files
        raise RewardError(path, f"is no picture ({type(error).__name__})", hint) from None
    if pixels > MAX_PIXELS:
        raise RewardError(path, f"has {pixels} pixels, and {MAX_PIXELS} are allowed", "shrink it first")


def read_image(path: Path) -> Tensor:
    """(3, H, W) fp32 in [0, 1], turned as its camera says.  Raises RewardError."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return pil_to_tensor(upright.convert("RGB")).float() / 255
    except Exception as error:  # as above: a file cut short shows only now
        raise RewardError(path, f"is a damaged picture ({type(error).__name__})", "make it again") from None


def batches(images: Sequence[Path], prompts: Sequence[str], size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """(B, 3, H, W) and B prompts, in order; neighbours of one size together, up to ``size``."""
    waiting: list[Tensor] = []
    first = 0
    for index, path in enumerate(images):
        image = read_image(path)
        if waiting and (len(waiting) == size or waiting[0].shape != image.shape):
            yield torch.stack(waiting), list(prompts[first:index])
            waiting, first = [], index
        waiting.append(image)
    yield torch.stack(waiting), list(prompts[first:])


@torch.no_grad()
def score_files(reward: Reward, images: Sequence[Path], prompts: Sequence[str], batch_size: int) -> list[float]:
    """One score a picture.  Raises RewardError."""
    scores: list[float] = []
    for pictures, told in batches(images, prompts, batch_size):
        scores += reward(pictures, told).tolist()
    wrong: list[Any] = [image for image, value in zip(images, scores) if value != value or abs(value) == float("inf")]
    if wrong:
        raise RewardError(wrong[0], f"got a score that is no number from {reward.name}", "try --dtype float32")
    return scores
