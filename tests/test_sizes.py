"""Sizes of sources and buckets against diffusers' own, and sides that vary."""

from __future__ import annotations

import math

import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from diffusers.training_utils import generate_aspect_ratio_buckets

from train_t2i.sizes import SHAPES, bucket_sizes, nearest, side_divisor, side_divisors, sized, source_sizes

IMAGES = [  # (height, width)
    (900, 1600), (1600, 900), (1024, 1024), (512, 512), (1, 1), (33, 31), (1080, 1920), (1920, 1080), (768, 1344),
    (640, 480), (480, 640), (3024, 4032), (4032, 3024), (100, 400), (400, 100), (1000, 333), (333, 1000), (1328, 1328),
    (1664, 928), (1140, 1472), (37, 1024), (999, 1001), (2, 3),
]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), IMAGES)
@pytest.mark.parametrize(("side", "seen"), [(1024, 384), (512, 96)])
def test_sources_have_the_sizes_that_both_pipelines_give_them(height, width, side, seen):
    found = source_sizes(height, width, side, seen)
    assert found.pixels == plus.calculate_dimensions(side**2, width / height)[::-1]
    assert found.seen == plus.calculate_dimensions(seen**2, width / height)[::-1]
    of_edit = edit.calculate_dimensions(side**2, width / height)
    assert source_sizes(height, width, side, None) == ((of_edit[1], of_edit[0]),) * 2


def test_the_sides_of_the_pipelines_are_the_defaults_of_the_flags():
    from train_t2i.config import Config

    assert (Config().source_size ** 2, Config().source_seen_size ** 2) == (
        plus.VAE_IMAGE_SIZE,
        plus.CONDITION_IMAGE_SIZE,
    )


def test_wide_high_and_square_differ():
    sizes = [source_sizes(*size, 1024, 384) for size in ((900, 1600), (1600, 900), (1000, 1000))]
    assert sizes == [((768, 1376), (288, 512)), ((1376, 768), (512, 288)), ((1024, 1024), (384, 384))]


def test_nothing_is_left_of_a_line():
    with pytest.raises(ValueError, match="20000x1 px is too narrow"):
        source_sizes(1, 20_000, 1024, None)


@pytest.mark.parametrize("side", [32, 64, 512, 768, 1024, 1328])
@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_buckets_are_those_of_diffusers(side, multiple):
    found = bucket_sizes(side, multiple)
    assert found == generate_aspect_ratio_buckets(side, multiple, list(SHAPES))
    assert {(width, height) for height, width in found} == set(found)
    assert all(height % multiple == width % multiple == 0 for height, width in found)
    if side >= 512:
        assert all(abs(height * width / side**2 - 1) < 0.07 for height, width in found)
    limit = side + multiple
    assert set(bucket_sizes(side, multiple, max_side_px=limit)) == {size for size in found if max(size) <= limit}


def test_the_shapes_are_forty_and_one():
    assert len(set(SHAPES)) == 41
    assert all(0.9 <= height * width / 512**2 <= 1 and height % 32 == width % 32 == 0 for height, width in SHAPES)


@pytest.mark.parametrize("height", [1000, *range(300, 3000, 91)])
@pytest.mark.parametrize("width", [1000, 2999])
def test_the_nearest_bucket_crops_least(height, width):
    buckets = bucket_sizes(1024, 16)

    def kept(bucket):
        """Share of the image that is left when it covers the bucket."""
        ratio = (height / width) / (bucket[0] / bucket[1])
        return min(ratio, 1 / ratio)

    chosen = nearest((height, width), buckets)
    assert kept(chosen) == pytest.approx(max(map(kept, buckets)))
    turned = nearest((width, height), buckets)
    assert kept(chosen) == pytest.approx(kept(turned[::-1]))
    if 1 / 4 <= height / width <= 4:
        assert kept(chosen) > 0.88


@pytest.mark.parametrize("side", [512, 767, 768, 800, 1023, 1024, 1328, 1535, 1536, 2048])
def test_no_side_gets_smaller_than_512(side):
    assert all(side / divisor >= 512 for divisor in side_divisors(side))
    assert bool(side_divisors(side)) == (side >= 768)
    height, width = sized((512, 512), side / max(side_divisors(side), default=1), 16)
    assert min(height, width) >= 512 or side < 768


def test_one_batch_of_ten_has_smaller_sides():
    drawn = [side_divisor(1024.0, 3, chunk) for chunk in range(4000)]
    assert abs(drawn.count(1.0) / 4000 - 0.9) < 4 * math.sqrt(0.09 / 4000)
    for divisor in (1.25, 1.5, 2.0):
        assert abs(drawn.count(divisor) / 4000 - 0.1 / 3) < 4 * math.sqrt(0.033 / 4000)
    assert set(drawn) == {1.0, 1.25, 1.5, 2.0}
    assert drawn == [side_divisor(1024.0, 3, chunk) for chunk in range(4000)]
    assert drawn != [side_divisor(1024.0, 4, chunk) for chunk in range(4000)]


def test_proportions_count_and_not_their_differences():
    buckets = [(256, 1024), (512, 512), (1024, 256)]
    assert [nearest(size, buckets) for size in ((600, 1000), (1000, 600), (400, 1000))] == [
        buckets[1],
        buckets[1],
        buckets[0],
    ]
