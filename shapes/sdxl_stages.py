"""The stages of the tiny SDXL and of the towers that judge all tiny models."""

from __future__ import annotations

import torch

from shapes import autoencoder as ae
from shapes import denoiser as dn
from shapes import measure, towers
from shapes.stage import Paths, Stage, judged, world
from shapes.text_encoders import TextRecipe, train_text_encoders

DECODED = 2048  # pictures that the towers also see as decoder output
CFGS = (2.0, 3.0, 4.0, 5.0)


def make_autoencoder(paths: Paths, run_name: str) -> dict[str, float]:
    vae = ae.train_autoencoder(world(paths), AUTOENCODER)
    ae.save(vae, paths.sdxl / "vae")
    return measure.autoencoder(paths.sdxl / "vae", judged(paths))


def make_tiny_decoder(paths: Paths, run_name: str) -> dict[str, float]:
    tiny = ae.train_tiny(measure.load_vae(paths.sdxl / "vae"), world(paths), TINY_DECODER)
    ae.save(tiny, paths.taesd)
    return measure.tiny_decoder(paths.sdxl / "vae", paths.taesd, judged(paths))


def make_text(paths: Paths, run_name: str) -> dict[str, float]:
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


def make_clip(paths: Paths, run_name: str) -> dict[str, float]:
    model = towers.train_clip(world(paths), decoded(paths), CLIP, "clip")
    towers.save_tower(model.clip, CLIP, paths.out / "tiny-clip")
    torch.save(model.state_dict(), paths.clip_trainee)
    return measure.tower(paths.out / "tiny-clip", judged(paths))


def make_hps(paths: Paths, run_name: str) -> dict[str, float]:
    start = towers.new_trainee(CLIP)
    start.load_state_dict(torch.load(paths.clip_trainee, weights_only=True))
    model = towers.train_hps(start, world(paths), decoded(paths), HPS, "hps")
    towers.save_tower(model.clip, HPS, paths.out / "tiny-hps", hps_file="HPS_tiny.pt")
    return measure.tower(paths.out / "tiny-hps", judged(paths))


def make_heldout(paths: Paths, run_name: str) -> dict[str, float]:
    model = towers.train_clip(world(paths), decoded(paths), HELD_OUT, "held-out judge")
    towers.save_tower(model.clip, HELD_OUT, paths.out / "tiny-clip-heldout")
    return measure.tower(paths.out / "tiny-clip-heldout", judged(paths))


def make_denoiser(paths: Paths, run_name: str) -> dict[str, float]:
    dn.train_denoiser(paths.sdxl, paths.work, DENOISER, run_name)
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
