"""Pieces of static pages: escaping, a document whose policy lets only its own style and script act, embedded images."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from train_t2i import redact

if TYPE_CHECKING:
    from PIL.Image import Image

HERE = Path(__file__).parent
SMALL_PX = 256  # images below are enlarged without smoothing, and kept without loss
WEBP_QUALITY = 82


def esc(value: object) -> str:
    """For a page that may be shown to anybody: runs of older versions may hold secrets."""
    return html.escape(redact.clean(str(value)), quote=True)


def in_script(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    return redact.clean(json.dumps(value, ensure_ascii=False)).replace("<", "\\u003c")


def source_hash(text: str) -> str:
    """For a Content-Security-Policy: this text, and no other, may run."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def text_of(name: str, folder: Path = HERE) -> str:
    """A style or script that lies beside the code."""
    return (folder / name).read_text(encoding="utf-8")


def document(title: str, body: str, style: str, script: str = "", *, images: str = "data:") -> str:
    """A whole page.  ``images``: where its pictures may come from.  Attributes of style and of events do nothing."""
    style = text_of("base.css") + style
    allowed = f"; script-src {source_hash(script)}" if script else ""
    policy = f"default-src 'none'; img-src {images}; style-src {source_hash(style)}{allowed}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{esc(title)}</title><style>{style}</style></head><body>{body}"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def shrunk(image: Image, max_width_px: int) -> Image:
    """The image, or a smaller copy where it is wider."""
    if image.width <= max_width_px:
        return image
    return image.resize((max_width_px, max(1, round(image.height * max_width_px / image.width))))


def webp(image: Image, max_width_px: int) -> str:
    """Data URI of an image, scaled down where it is wider; small ones, which are shown enlarged, lose nothing."""
    buffer = io.BytesIO()
    shrunk(image, max_width_px).save(
        buffer, "WEBP", quality=WEBP_QUALITY, lossless=image.width < SMALL_PX and image.width <= max_width_px
    )
    return data_uri(buffer.getvalue(), "webp")
