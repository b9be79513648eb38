"""Trains every model of the embedded world and writes it to `checkpoints/`, in half precision and with fixed seeds.

    python -m shapes.pretrain                       # everything that is missing or whose recipe has changed
    python -m shapes.pretrain --only clip hps       # these stages
    python -m shapes.pretrain --force denoiser      # again, whatever is there

A stage whose output exists with the digest of its recipe (and of the recipes it builds on) is skipped, so an interrupted run goes
on where it stopped.  `checkpoints/tiny-recipes.json` keeps the digests, the seconds and the measured quality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shapes import autoencoder as ae
from shapes import denoiser as dn
from shapes import measure, towers
from shapes.manifest import write_manifest
from shapes.text_encoders import TextRecipe, train_text_encoders
from shapes.world import World, load_world

SEED = 0
PICTURES = 8192
DECODED = 2048  # pictures that the towers also see as decoder output
CFGS = (2.0, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Paths:
    """`out`: the committed folder; `work`: what can be made again."""

    out: Path
    work: Path

    @property
    def sdxl(self) -> Path:
        return self.out / "tiny-sdxl"

    @property
    def taesd(self) -> Path:
        return self.out / "tiny-taesd"

    @property
    def record(self) -> Path:
        return self.out / "tiny-recipes.json"


@dataclass(frozen=True)
class Stage:
    """One thing to train: what decides its outcome, what it builds on, where it ends up, how it is made."""

    name: str
    recipe: Any
    needs: tuple[str, ...]
    output: Callable[[Paths], Path]
    make: Callable[[Paths], dict[str, float]]


def world(paths: Paths) -> World:
    """The training pictures, the same for all stages."""
    return load_world("train", SEED, PICTURES, paths.work)


def judged(paths: Paths, count: int = 500) -> World:
    """Pictures that no stage trains on."""
    return load_world("heldout", SEED + 1, count, paths.work)


def make_autoencoder(paths: Paths) -> dict[str, float]:
    vae = ae.train_autoencoder(world(paths), AUTOENCODER)
    ae.save(vae, paths.sdxl / "vae")
    return measure.autoencoder(paths.sdxl / "vae", judged(paths))


def make_tiny_decoder(paths: Paths) -> dict[str, float]:
    tiny = ae.train_tiny(measure.load_vae(paths.sdxl / "vae"), world(paths), TINY_DECODER)
    ae.save(tiny, paths.taesd)
    return measure.tiny_decoder(paths.sdxl / "vae", paths.taesd, judged(paths))


def make_text(paths: Paths) -> dict[str, float]:
    """Also writes the rest of the pipeline folder, with an untrained UNet."""
    first, second, quality = train_text_encoders(world(paths), TEXT)
    torch.manual_seed(DENOISER.seed)
    unet = dn.new_unet(DENOISER, TEXT.widths)
    dn.assemble(measure.load_vae(paths.sdxl / "vae"), (first, second), unet, paths.sdxl)
    return {f"penultimate state of {name} tells the scene": value for name, value in quality.items()}


def decoded(paths: Paths) -> torch.Tensor:
    """(DECODED, 3, 64, 64) uint8: the first pictures through the autoencoder, by turns with either decoder."""
    vae, tiny = measure.load_vae(paths.sdxl / "vae"), measure.load_tiny(paths.taesd)
    latents = ae.encode(vae, world(paths).images(torch.arange(DECODED)))
    out = torch.empty(DECODED, 3, 64, 64)
    out[::2], out[1::2] = ae.decode(vae, latents[::2]), ae.decode_fast(tiny, latents[1::2])
    return (out * 255 + 0.5).byte()


def make_clip(paths: Paths) -> dict[str, float]:
    model = towers.train_clip(world(paths), decoded(paths), CLIP, "clip")
    towers.save_tower(model.clip, CLIP, paths.out / "tiny-clip")
    torch.save(model.state_dict(), paths.work / "clip-trainee.pt")  # where the preferences start from
    return measure.tower(paths.out / "tiny-clip", judged(paths))


def make_hps(paths: Paths) -> dict[str, float]:
    start = towers.new_trainee(CLIP)
    start.load_state_dict(torch.load(paths.work / "clip-trainee.pt", weights_only=True))
    model = towers.train_hps(start, world(paths), decoded(paths), HPS, "hps")
    towers.save_tower(model.clip, HPS, paths.out / "tiny-hps", hps_file="HPS_tiny.pt")
    return measure.tower(paths.out / "tiny-hps", judged(paths))


def make_heldout(paths: Paths) -> dict[str, float]:
    model = towers.train_clip(world(paths), decoded(paths), HELD_OUT, "held-out judge")
    towers.save_tower(model.clip, HELD_OUT, paths.out / "tiny-clip-heldout")
    return measure.tower(paths.out / "tiny-clip-heldout", judged(paths))


def make_denoiser(paths: Paths) -> dict[str, float]:
    dn.train_denoiser(paths.sdxl, paths.work, DENOISER)
    scores = dn.teacher_adherence(paths.sdxl, CFGS)
    return {f"adherence, 25 steps, cfg {cfg:g}": value for cfg, value in scores.items()}


AUTOENCODER = ae.AutoencoderRecipe()
TINY_DECODER = ae.TinyDecoderRecipe()
TEXT = TextRecipe()
CLIP = towers.TowerRecipe()
HPS = towers.TowerRecipe(seed=32, steps=500, learning_rate=5e-4)
HELD_OUT = towers.TowerRecipe(seed=33, vision=(4, 48, 24), text=(3, 32, 4), adversarial_every=4)
DENOISER = dn.DenoiserRecipe()

STAGES = (
    Stage("autoencoder", AUTOENCODER, (), lambda p: p.sdxl / "vae", make_autoencoder),
    Stage("tiny-decoder", TINY_DECODER, ("autoencoder",), lambda p: p.taesd, make_tiny_decoder),
    Stage("text", TEXT, ("autoencoder",), lambda p: p.sdxl / "text_encoder_2", make_text),
    Stage("clip", CLIP, ("autoencoder", "tiny-decoder"), lambda p: p.out / "tiny-clip", make_clip),
    Stage("hps", HPS, ("clip",), lambda p: p.out / "tiny-hps", make_hps),
    Stage("heldout", HELD_OUT, ("autoencoder", "tiny-decoder"), lambda p: p.out / "tiny-clip-heldout", make_heldout),
    Stage("denoiser", DENOISER, ("autoencoder", "text"), lambda p: p.sdxl / "unet", make_denoiser),
)


def digest(stage: Stage) -> str:
    """Digest of a stage's recipe and of all that it builds on."""
    below = [digest(other) for other in STAGES if other.name in stage.needs]
    return hashlib.blake2b(repr((stage.name, stage.recipe, PICTURES, below)).encode(), digest_size=8).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run(stage: Stage, paths: Paths, force: bool) -> None:
    """Make one stage unless it is there already, and note what came of it."""
    record = read_record(paths.record)
    known = record.get(stage.name, {})
    if not force and known.get("digest") == digest(stage) and stage.output(paths).exists():
        print(f"{stage.name}: present, {known['measured']}", flush=True)
        return
    print(f"{stage.name}: training", flush=True)
    start = time.monotonic()
    measured = {key: round(value, 4) for key, value in stage.make(paths).items()}
    seconds = round(time.monotonic() - start)
    print(f"{stage.name}: done in {seconds} s, {measured}", flush=True)
    record = {
        **read_record(paths.record),
        stage.name: {"digest": digest(stage), "seconds": seconds, "measured": measured},
    }
    partial = paths.record.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, paths.record)


def main(argv: list[str] | None = None) -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m shapes.pretrain", description="Train the tiny models.")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="where intermediate files go")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="stages to run")
    parser.add_argument("--force", nargs="+", choices=names, default=[], help="stages to run even if present")
    args = parser.parse_args(argv)
    paths = Paths(args.out, args.work)
    for folder in (paths.out, paths.work):
        folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage.name in args.only or stage.name in args.force:
            run(stage, paths, stage.name in args.force)
    write_manifest(paths.out, read_record(paths.record))


if __name__ == "__main__":
    main()
