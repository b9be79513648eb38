"""Image files: their sizes from the header alone, and their pixels, upright, in RGB, transparent parts on white.

An image that cannot be used is a UserError that names its row.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from train_t2i.errors import UserError
from train_t2i.sizes import Size, SourceSizes
from train_t2i.tables import short

MAX_IMAGE_PIXELS = 64_000_000
ORIENTATION = 0x0112  # EXIF; 5 to 8 are turned by a quarter
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
PNG_SIGNATURE_BYTES = 8
PNG_ORIENTED = ("Raw profile type exif", "XML:com.adobe.xmp")  # texts in which Pillow looks for the orientation


def fit_image(path: Path, place: str, height_px: int, width_px: int) -> Tensor:
    """(3, height_px, width_px) fp32 in [0, 1]: the largest centred part of that shape, resized (bicubic, antialiased).

    ``place`` is where the file is named, for messages.  Raises UserError for an image that cannot be used.
    """
    image = _decode(path, place)
    scale = min(image.width / width_px, image.height / height_px)  # pixels of the image for one of the result
    width, height = width_px * scale, height_px * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return _unit(image.resize((width_px, height_px), Image.Resampling.BICUBIC, box))


def exact_image(path: Path, place: str, height_px: int, width_px: int) -> Tensor:
    """(3, height_px, width_px) fp32 in [0, 1], every pixel as it is in the file.  Raises UserError for another size."""
    image = _decode(path, place)
    if image.size != (width_px, height_px):
        raise UserError(f"{place}: image {path.name} has changed while it was used", "start again")
    return _unit(image)


def source_image(path: Path, place: str, sizes: SourceSizes) -> tuple[Tensor, Tensor]:
    """((3, h, w), (3, h', w')) uint8 for the two readers of a source, resized as diffusers' VaeImageProcessor does.

    Raises UserError for an image that cannot be used.
    """
    image = _decode(path, place)
    pixels = _resized(image, sizes.pixels)
    return pixels, pixels if sizes.seen == sizes.pixels else _resized(image, sizes.seen)


def image_size(path: Path, place: str) -> Size:
    """(height, width) in pixels of an image as it is shown; reads its header alone.  Raises UserError."""
    with quiet():
        return header_size(path, place)


def header_size(path: Path, place: str) -> Size:
    """``image_size`` for threads that stand in one ``quiet``."""
    with _opened(path, place) as image:
        turned = _oriented(image, path) and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of large images: our limit is lower than Pillow's, and an error.  The filters belong to all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _oriented(image: Image.Image, path: Path) -> bool:
    """Whether an image may say how it is turned.  To look behind a PNG's pixels, Pillow decodes them all."""
    if image.format != "PNG" or {"exif", *PNG_ORIENTED} & set(image.info):
        return True
    with path.open("rb") as file:
        return _told_late(file)


def _told_late(file: BinaryIO) -> bool:
    """Whether any chunk of a PNG tells an orientation.  A chunk: its length, its kind, its body and a checksum."""
    file.seek(PNG_SIGNATURE_BYTES)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        keyword = file.read(min(length, 80)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
        if kind == b"eXIf" or keyword.partition(b"\0")[0].decode("latin-1") in PNG_ORIENTED:
            return True
        file.seek(length - len(keyword) + 4, 1)
    return False


@contextlib.contextmanager
def _opened(path: Path, place: str) -> Iterator[Image.Image]:
    """An image of a format and size that can be used.  Whatever goes wrong inside is told with the place."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} px is more than {MAX_IMAGE_PIXELS} pixels")
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            yield image
    except Exception as error:  # decoders raise whatever a broken file makes them
        raise UserError(
            f"{place}: image {path.name} cannot be used: {short(str(error))}", "replace it or drop the row"
        ) from None


def _decode(path: Path, place: str) -> Image.Image:
    with quiet(), _opened(path, place) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert("RGB")


def _resized(image: Image.Image, size: Size) -> Tensor:
    return _bytes(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _unit(image: Image.Image) -> Tensor:
    return _bytes(image).float().div_(255)


def _bytes(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
