"""Every rule about the size of an image, in pixels as (height, width): sources, buckets, and sides that vary.

Sources follow diffusers' ``calculate_dimensions`` of both Qwen-Image-Edit pipelines, so that training sees what inference does.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]  # (height, width)

SOURCE_MULTIPLE = 32
WIDE = (
    *((256, width) for width in (1024, 992, 960, 928)), *((288, width) for width in (896, 864, 832)),
    *((320, width) for width in (800, 768)), *((352, width) for width in (736, 704, 672)),
    *((384, width) for width in (672, 640)), *((416, width) for width in (608, 576)),
    *((448, width) for width in (576, 544)), *((480, width) for width in (544, 512)),
)  # fmt: skip
# the shapes of VideoX-Fun's ASPECT_RATIO_512, which lacks 672x352 alone: a turned image has the turned shape here
SHAPES: tuple[Size, ...] = (*WIDE, (512, 512), *((width, height) for height, width in reversed(WIDE)))

# a side's least number of pixels -> by what it may be divided, so that nothing gets smaller than 512
SIDE_DIVISORS = {1536: (1.25, 1.5, 2.0, 2.5, 3.0), 1024: (1.25, 1.5, 2.0), 768: (1.25, 1.5)}
WHOLE_SHARE = 0.9  # of batches, which keep their side


class SourceSizes(NamedTuple):
    """What the two readers of a source get."""

    pixels: Size  # the VAE
    seen: Size  # the text encoder


def source_sizes(height: int, width: int, side_px: int, seen_side_px: int | None) -> SourceSizes:
    """Sizes of an image of ``height`` x ``width``; ``seen_side_px`` None: the text encoder sees what the VAE does.

    Raises ValueError for an image so narrow that nothing of it is left.
    """
    pixels = _of_area(height, width, side_px)
    return SourceSizes(pixels, pixels if seen_side_px is None else _of_area(height, width, seen_side_px))


def _of_area(height: int, width: int, side_px: int) -> Size:
    """diffusers' calculate_dimensions(side_px**2, width / height), in its order of operations."""
    ratio = width / height
    wide = math.sqrt(side_px * side_px * ratio)
    size = round(wide / ratio / SOURCE_MULTIPLE) * SOURCE_MULTIPLE, round(wide / SOURCE_MULTIPLE) * SOURCE_MULTIPLE
    if not all(size):
        raise ValueError(f"{width}x{height} px is too narrow to be brought to the area of {side_px}x{side_px}")
    return size


def sized(shape: Size, side_px: float, multiple: int) -> Size:
    """The size in proportion ``shape`` of about ``side_px`` squared pixels, its sides multiples of ``multiple``.

    The rule of diffusers' generate_aspect_ratio_buckets.
    """
    high = math.sqrt(side_px * side_px * shape[0] / shape[1])
    sides = high, high * shape[1] / shape[0]
    height, width = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return height, width


def bucket_sizes(side_px: float, multiple: int, max_side_px: int | None = None) -> list[Size]:
    """The sizes in which images of every shape have about ``side_px`` squared pixels, wide ones first."""
    sizes = dict.fromkeys(sized(shape, side_px, multiple) for shape in SHAPES)
    return [size for size in sizes if max_side_px is None or max(size) <= max_side_px]


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose proportion is nearest, so that least is cropped; as near for an image as for the turned one."""
    wanted = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - wanted))


def side_divisors(side_px: float) -> tuple[float, ...]:
    """By what a batch's side may be divided, beside 1; none where the side is below 768."""
    return next((divisors for least, divisors in SIDE_DIVISORS.items() if side_px >= least), ())


@functools.lru_cache(maxsize=16)
def side_divisor(side_px: float, seed: int, chunk: int) -> float:
    """What the side of a chunk's images is divided by: nine times of ten 1, else any of ``side_divisors``."""
    divisors = side_divisors(side_px)
    digest = hashlib.blake2b(f"{seed}/side/{chunk}".encode(), digest_size=16).digest()
    first, second = (number / 2**64 for number in struct.unpack("<2Q", digest))
    return 1.0 if first < WHOLE_SHARE or not divisors else divisors[int(second * len(divisors))]
