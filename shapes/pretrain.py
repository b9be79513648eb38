"""Trains every model of the embedded world and writes it to `checkpoints/`, in half precision and with fixed seeds.

    python -m shapes.pretrain                       # everything that is missing or whose recipe has changed
    python -m shapes.pretrain --only clip hps       # these stages
    python -m shapes.pretrain --force denoiser      # again, whatever is there, and what builds on it

A stage whose output exists with the digest of its recipe (and of the recipes it builds on) is skipped, so an interrupted run goes
on where it stopped when it is started without --force, which begins anew each time.  `checkpoints/tiny-recipes.json` keeps the
digests, the seconds and the measured quality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
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
    def clip_trainee(self) -> Path:
        """What the preference tower starts from."""
        return self.work / "clip-trainee.pt"

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
    torch.save(model.state_dict(), paths.clip_trainee)
    return measure.tower(paths.out / "tiny-clip", judged(paths))


def make_hps(paths: Paths) -> dict[str, float]:
    start = towers.new_trainee(CLIP)
    start.load_state_dict(torch.load(paths.clip_trainee, weights_only=True))
    model = towers.train_hps(start, world(paths), decoded(paths), HPS, "hps")
    towers.save_tower(model.clip, HPS, paths.out / "tiny-hps", hps_file="HPS_tiny.pt")
    return measure.tower(paths.out / "tiny-hps", judged(paths))


def make_heldout(paths: Paths) -> dict[str, float]:
    model = towers.train_clip(world(paths), decoded(paths), HELD_OUT, "held-out judge")
    towers.save_tower(model.clip, HELD_OUT, paths.out / "tiny-clip-heldout")
    return measure.tower(paths.out / "tiny-clip-heldout", judged(paths))


def make_denoiser(paths: Paths) -> dict[str, float]:
    (stage,) = (stage for stage in STAGES if stage.make is make_denoiser)
    dn.train_denoiser(paths.sdxl, paths.work, DENOISER, run_name(stage))
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


def run_name(stage: Stage) -> str:
    """The folder in `work` of a stage that the trainer trains."""
    return f"{stage.name}-{digest(stage)}"


def read_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def present(stage: Stage, paths: Paths) -> bool:
    known = read_record(paths.record).get(stage.name, {})
    return known.get("digest") == digest(stage) and stage.output(paths).exists()


def with_dependents(names: set[str]) -> set[str]:
    """These stages and all that build on them."""
    found = set(names)
    for stage in STAGES:  # each comes after what it needs
        if found & set(stage.needs):
            found.add(stage.name)
    return found


def plan(paths: Paths, only: set[str], force: set[str]) -> list[Stage]:
    """What is to be made, in order: what is forced, missing or of another recipe, and what builds on that."""
    forced, todo = with_dependents(force), list[Stage]()
    for stage in STAGES:
        stale = not present(stage, paths) or any(other.name in stage.needs for other in todo)
        if stage.name in forced or (stage.name in only and stale):
            todo.append(stage)
    return todo


def forget(paths: Paths, stages: set[str]) -> None:
    """Nothing of these stages counts as done any more, nor goes on where it stopped."""
    record = {name: known for name, known in read_record(paths.record).items() if name not in stages}
    write_record(paths.record, record)
    for stage in STAGES:
        if stage.name in stages:
            shutil.rmtree(paths.work / run_name(stage), ignore_errors=True)


def run(stage: Stage, paths: Paths) -> None:
    """Make one stage and note what came of it; what was built on the old one is forgotten first."""
    forget(paths, with_dependents({stage.name}) - {stage.name})
    print(f"{stage.name}: training", flush=True)
    start = time.monotonic()
    measured = {key: round(value, 4) for key, value in stage.make(paths).items()}
    seconds = round(time.monotonic() - start)
    print(f"{stage.name}: done in {seconds} s, {measured}", flush=True)
    known = {"digest": digest(stage), "seconds": seconds, "measured": measured}
    write_record(paths.record, {**read_record(paths.record), stage.name: known})


def main(argv: list[str] | None = None) -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m shapes.pretrain", description="Train the tiny models.")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="where intermediate files go")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="stages to run")
    parser.add_argument(
        "--force", nargs="+", choices=names, default=[], help="stages to run even if present, with what builds on them"
    )
    args = parser.parse_args(argv)
    paths = Paths(args.out, args.work)
    for folder in (paths.out, paths.work):
        folder.mkdir(parents=True, exist_ok=True)
    todo = plan(paths, set(args.only), set(args.force))
    names = [stage.name for stage in todo]
    if "hps" in names and "clip" not in names and not paths.clip_trainee.exists():
        parser.error(
            f"stage hps starts from {paths.clip_trainee}, which is not there: add --force clip, which makes it"
        )
    print(f"to make: {', '.join(names) or 'nothing, all is present'}", flush=True)
    if args.force:
        forget(paths, with_dependents(set(args.force)))
    for stage in todo:
        run(stage, paths)
    write_manifest(paths.out, read_record(paths.record))


if __name__ == "__main__":
    main()
