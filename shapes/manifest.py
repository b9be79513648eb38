"""Writes the tiny models' part of `checkpoints/manifest.toml`: their digests and quality.

The rest of the file, where the real weights and data are, is written by hand and stays as it is.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

# folder, stages whose measurements belong to it, what it is
TINY = (
    (
        "tiny-sdxl",
        ("autoencoder", "text", "denoiser"),
        "teacher of the embedded world, a StableDiffusionXLPipeline folder",
    ),
    (
        "tiny-sd3",
        ("wide-autoencoder", "t5", "sd3"),
        "teacher of the embedded world, a StableDiffusion3Pipeline folder",
    ),
    (
        "tiny-flux",
        ("wide-autoencoder", "t5", "flux", "flux-guidance"),
        "teacher of the embedded world, a FluxPipeline folder, its guidance distilled into a number",
    ),
    (
        "tiny-qwen-image",
        ("qwen-autoencoder", "qwen-text", "qwen-image"),
        "teacher of the embedded world, a QwenImagePipeline folder",
    ),
    (
        "tiny-qwen-image-edit",
        ("qwen-edit-text", "qwen-image-edit"),
        "teacher of the embedded world's edits, a QwenImageEditPlusPipeline folder that starts from tiny-qwen-image",
    ),
    ("tiny-taesd", ("tiny-decoder",), "fast decoder for tiny-sdxl latents (AutoencoderTiny)"),
    ("tiny-clip", ("clip",), "reward: contrastive tower, an open_clip folder"),
    ("tiny-hps", ("hps",), "reward: preference tower, saved as HPSv2.1 is"),
    ("tiny-clip-heldout", ("heldout",), "judge: another seed and architecture, never in a loss"),
)

# of a manifest that is not there yet
HEAD = """# Every checkpoint and data file of the toolkit: where it comes from, under which licence, and its digest where known.
# `python -m train_t2i fetch NAME` downloads an entry of [real].  [tiny] is written by `python -m shapes.pretrain`.
"""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _by_hand(path: Path) -> str:
    """What stands before the first tiny model."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    return re.split(r"^\[tiny\b", text, maxsplit=1, flags=re.MULTILINE)[0].rstrip() + "\n"


def _tiny(out: Path, record: dict[str, Any]) -> list[str]:
    lines = []
    for name, stages, what in TINY:
        files = sorted(p for p in (out / name).rglob("*") if p.suffix in (".safetensors", ".pt"))
        if not files:
            continue
        command = f"python -m shapes.pretrain --only {' '.join(stages)}"
        lines += [f"[tiny.{_quote(name)}]", f"what = {_quote(what)}", f"origin = {_quote('trained here')}"]
        terms = [f"licence = {_quote('Apache-2.0')}", f"licence_id = {_quote('apache-2.0')}"]  # as the hub calls it
        lines += [f"command = {_quote(command)}", *terms, f"[tiny.{_quote(name)}.sha256]"]
        lines += [f"{_quote(str(p.relative_to(out / name)))} = {_quote(_sha256(p))}" for p in files]
        lines.append(f"[tiny.{_quote(name)}.measured]")
        for stage in stages:
            for key, value in record.get(stage, {}).get("measured", {}).items():
                lines.append(f"{_quote(f'{stage}: {key}')} = {value}")
        lines.append("")
    return lines


def write_manifest(out: Path, record: dict[str, Any]) -> None:
    """Write `out`/manifest.toml from what is there, below what was written by hand."""
    path = out / "manifest.toml"
    path.write_text("\n".join([_by_hand(path), *_tiny(out, record)]).rstrip() + "\n", encoding="utf-8")
