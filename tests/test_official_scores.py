"""Against what the authors' own packages scored on the same weights and pictures (recorded by tests/official/record.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official.inputs import PROMPTS, SIZES, digest, picture
from PIL import Image

from rewards import REWARDS, Choices
from rewards.random_weights import write
from rewards.weights import read_state

RECORD = json.loads((Path(__file__).parent / "official/scores.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("official")
    return {"hpsv2": write("hpsv2", root / "hps"), "imagereward": write("imagereward", root / "ir").parent}


def pictures() -> list[torch.Tensor]:
    """(1, 3, H, W) fp32 in [0, 1] each."""
    return [torch.from_numpy(picture(*size)).permute(2, 0, 1)[None].float() / 255 for size in SIZES]


def test_the_inputs_are_those_of_the_record(folders: dict[str, Path]) -> None:
    """Where this fails, the numbers below were made from other weights: record them again."""
    assert digest(np.concatenate([picture(*size).ravel() for size in SIZES])) == RECORD["pictures"]
    assert digest(read_state(folders["hpsv2"] / "open_clip_model.safetensors")) == RECORD["hpsv2"]["weights"]
    assert digest(read_state(folders["imagereward"] / "ImageReward.pt")) == RECORD["imagereward"]["weights"]


@pytest.mark.parametrize("antialias", [True, False])
def test_hpsv2_equals_its_package(antialias: bool, folders: dict[str, Path]) -> None:
    """Square, portrait, landscape, odd sides and enlarged; the package resizes tensors, so nothing is rounded."""
    reward = REWARDS["hpsv2"](folders["hpsv2"], choices=Choices(antialias=antialias))
    scores = torch.cat([reward(image, [prompt]) for image, prompt in zip(pictures(), PROMPTS)])
    expected = RECORD["hpsv2"]["antialiased" if antialias else "not antialiased"]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)
    assert max(abs(a - b) for a, b in zip(RECORD["hpsv2"]["antialiased"], RECORD["hpsv2"]["not antialiased"])) > 1e-2


def rounded_by_pil(image: np.ndarray, side_px: int) -> torch.Tensor:
    """The package's resize and crop through PIL, with its 8 bits: the input at which no resampling is left."""
    height, width = image.shape[:2]
    wide, tall = int(side_px * width / height), int(side_px * height / width)
    size = (wide, side_px) if height <= width else (side_px, tall)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (round((have - side_px) / 2) for have in resized.shape[:2])
    cut = resized[top : top + side_px, left : left + side_px]
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float() / 255


def test_imagereward_equals_its_package(folders: dict[str, Path]) -> None:
    """Exact where PIL's rounding is taken over; within its 8 bits where our own resampling, which has a gradient, is used."""
    reward = REWARDS["imagereward"](folders["imagereward"])
    expected = torch.tensor(RECORD["imagereward"]["scores"])
    exact = torch.cat([reward(rounded_by_pil(picture(*size), 32), [prompt]) for size, prompt in zip(SIZES, PROMPTS)])
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=0)
    ours = torch.cat([reward(image, [prompt]) for image, prompt in zip(pictures(), PROMPTS)])
    torch.testing.assert_close(ours, expected, atol=0.03, rtol=0)
