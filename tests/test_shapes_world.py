"""The embedded world: captions read back, splits do not leak, the oracle sees what is there and nothing else."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from shapes import scenes
from shapes.oracle import adherence, read
from shapes.render import render

COUNT = 300


@pytest.fixture(scope="module")
def world():
    drawn = list(scenes.samples("heldout", 7, COUNT))
    pictures = [render(s, scenes.rng_for("heldout", 7, i, stream=1)) for i, (s, _) in enumerate(drawn)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return [s for s, _ in drawn], [c for _, c in drawn], images


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_caption_reads_back_in_every_template(split):
    for scene, _ in scenes.samples(split, 3, 200):
        for template in range(scenes.NUM_TEMPLATES):
            text = scenes.caption(scene, template)
            assert scenes.parse(text) == scene
            assert scenes.parse(text.upper() + ", sharp, best quality") == scene


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red circle on a grey background", "a small red circle on a grey background"]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        scenes.parse(text)


def test_splits_do_not_leak():
    train = {scene for scene, _ in scenes.samples("train", 0, 3000)}
    heldout = [scene for scene, _ in scenes.samples("heldout", 0, 1000)]
    assert not train & set(heldout)
    assert not any(scenes.has_held_out_pair(scene) for scene in train)
    seen = {(thing.shape, thing.colour) for scene in train for thing in scene.things}
    assert len(seen) == len(scenes.SHAPES) * len(scenes.COLOURS) - len(scenes.HELD_OUT_PAIRS)
    assert 0.3 < sum(map(scenes.has_held_out_pair, heldout)) / 1000 < 0.5
    assert not any(scenes.has_held_out_pair(scene) for scene, _ in scenes.samples("eval", 0, 300))


def test_a_sample_depends_on_its_seed_and_index_alone(world):
    drawn, captions, images = world
    assert scenes.sample("heldout", 7, 41) == (drawn[41], captions[41])
    again = render(drawn[41], scenes.rng_for("heldout", 7, 41, stream=1))
    assert np.array_equal(again, images[41].permute(1, 2, 0).numpy())
    assert scenes.sample("heldout", 8, 41) != scenes.sample("heldout", 7, 41)


def test_oracle_reads_every_attribute(world):
    drawn, captions, images = world
    readings = [reading.scene for reading in read(images)]
    right = [r is not None and r == s for r, s in zip(readings, drawn)]
    assert np.mean(right) >= 0.99
    for attribute in ("background", "position", "relation", "things"):
        assert np.mean([getattr(r, attribute, 0) == getattr(s, attribute) for r, s in zip(readings, drawn)]) >= 0.99
    assert adherence(images, captions).mean() >= 0.99


def test_oracle_forgives_blur_and_noise(world):
    _, captions, images = world
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert adherence(soft, captions).mean() >= 0.98
    assert adherence((soft + 0.04 * noise).clamp(0, 1), captions).mean() >= 0.98


def test_wrong_captions_and_mush_get_nothing(world):
    drawn, captions, images = world
    wrong = captions[1:] + captions[:1]
    assert adherence(images, wrong).sum() <= sum(a == b for a, b in zip(drawn, drawn[1:] + drawn[:1]))
    generator = torch.Generator().manual_seed(0)
    static = torch.rand(images.shape, generator=generator)
    blobs = F.interpolate(torch.rand(COUNT, 3, 8, 8, generator=generator), 64, mode="bicubic").clamp(0, 1)
    mush = F.interpolate(F.interpolate(images, 12, mode="area"), 64, mode="bilinear")
    ghosts = 0.5 * images + 0.5 * images.roll(1, 0)
    flat = torch.full_like(images, 0.5)
    for bad in (static, blobs, mush, ghosts, flat, torch.full_like(images, float("nan"))):
        assert adherence(bad, captions).mean() <= 0.01


def test_oracle_reads_larger_pictures(world):
    _, captions, images = world
    assert adherence(F.interpolate(images[:50], 256, mode="nearest"), captions[:50]).mean() >= 0.98


def test_command_line_writes_prompts_and_pictures(tmp_path):
    prompts = tmp_path / "prompts.txt"
    scenes.main(["prompts", "--split", "heldout", "--count", "50", "--seed", "5", "--out", str(prompts)])
    lines = prompts.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 50
    scenes.main(["render", "--split", "train", "--count", "6", "--out", str(tmp_path / "pictures")])
    with open(tmp_path / "pictures" / "metadata.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    images = [np.asarray(Image.open(tmp_path / "pictures" / row["image"]), np.float32) / 255 for row in rows]
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert adherence(stacked, [row["prompt"] for row in rows]).min() == 1
