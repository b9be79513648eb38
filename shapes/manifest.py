"""Writes `checkpoints/manifest.toml`: the tiny models with digests and quality, and where the real weights and data are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

# name, what it is, repository, kind of repository, file there ("" = the whole pipeline folder), local name, licence
REAL = (
    (
        "sdxl-base",
        "teacher: Stable Diffusion XL base 1.0, a diffusers folder",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "model",
        "",
        "stable-diffusion-xl-base-1.0",
        "CreativeML Open RAIL++-M",
    ),
    (
        "dfn5b-clip",
        "reward: DFN5B-CLIP ViT-H-14 (QuickGELU), 224 px",
        "apple/DFN5B-CLIP-ViT-H-14",
        "model",
        "open_clip_pytorch_model.bin",
        "Apple_CLIP-H-14-224.bin",
        "Apple (see the repository)",
    ),
    (
        "hpsv2.1",
        "reward: HPSv2.1 ViT-H-14",
        "xswu/HPSv2",
        "model",
        "HPS_v2.1_compressed.pt",
        "HPS_v2.1_compressed.pt",
        "Apache-2.0",
    ),
    (
        "dmd2-ode-init",
        "initialisation of a one-step SDXL student (ODE regression at t=399)",
        "tianweiy/DMD2",
        "model",
        "model/sdxl/sdxl_lr1e-5_8node_ode_pretraining_10k_cond399_checkpoint_model_002000.bin",
        "sdxl_lr1e-5_8node_ode_pretraining_10k_cond399_checkpoint_model_002000.bin",
        "CC-BY-NC-4.0",
    ),
    ("taesdxl", "fast decoder for SDXL latents", "madebyollin/taesdxl", "model", "", "taesdxl", "MIT"),
    (
        "t2i-2m-prompts",
        "training prompts of the SDXL recipes",
        "DyJiang/dmdr",
        "model",
        "t2i-2m-filtered-prompts.txt",
        "t2i-2m-filtered-prompts.txt",
        "see the repository",
    ),
)

# folder, stages whose measurements belong to it, what it is
TINY = (
    (
        "tiny-sdxl",
        ("autoencoder", "text", "denoiser"),
        "teacher of the embedded world, a StableDiffusionXLPipeline folder",
    ),
    ("tiny-taesd", ("tiny-decoder",), "fast decoder for tiny-sdxl latents (AutoencoderTiny)"),
    ("tiny-clip", ("clip",), "reward: contrastive tower, an open_clip folder"),
    ("tiny-hps", ("hps",), "reward: preference tower, saved as HPSv2.1 is"),
    ("tiny-clip-heldout", ("heldout",), "judge: another seed and architecture, never in a loss"),
)

HEAD = """# Every checkpoint and data file of the toolkit: where it comes from, under which licence, and its digest where known.
# `python -m train_t2i fetch NAME` downloads an entry of [real].  [tiny] is written by `python -m shapes.pretrain`.
"""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _real() -> list[str]:
    lines = []
    for name, what, repository, kind, file, local, licence in REAL:
        lines += [f"[real.{_quote(name)}]", f"what = {_quote(what)}", f"repository = {_quote(repository)}"]
        lines += [f"repository_type = {_quote(kind)}"]
        lines += [f"file = {_quote(file)}"] if file else []
        lines += [f"local_name = {_quote(local)}", f"licence = {_quote(licence)}", ""]
    return lines


def _tiny(out: Path, record: dict[str, Any]) -> list[str]:
    lines = []
    for name, stages, what in TINY:
        files = sorted(p for p in (out / name).rglob("*") if p.suffix in (".safetensors", ".pt"))
        if not files:
            continue
        command = f"python -m shapes.pretrain --only {' '.join(stages)}"
        lines += [f"[tiny.{_quote(name)}]", f"what = {_quote(what)}", f"origin = {_quote('trained here')}"]
        lines += [f"command = {_quote(command)}", f"licence = {_quote('Apache-2.0')}", f"[tiny.{_quote(name)}.sha256]"]
        lines += [f"{_quote(str(p.relative_to(out / name)))} = {_quote(_sha256(p))}" for p in files]
        lines.append(f"[tiny.{_quote(name)}.measured]")
        for stage in stages:
            for key, value in record.get(stage, {}).get("measured", {}).items():
                lines.append(f"{_quote(f'{stage}: {key}')} = {value}")
        lines.append("")
    return lines


def write_manifest(out: Path, record: dict[str, Any]) -> None:
    """Write `out`/manifest.toml from what is there."""
    text = "\n".join([HEAD, *_real(), *_tiny(out, record)]).rstrip() + "\n"
    (out / "manifest.toml").write_text(text, encoding="utf-8")
