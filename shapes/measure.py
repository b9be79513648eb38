"""What the trained models are worth, measured on pictures that none of them saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from open_clip import CLIP, SimpleTokenizer
from safetensors.torch import load_file

from shapes import autoencoder as ae
from shapes import degrade
from shapes.scenes import caption
from shapes.towers import normalise
from shapes.world import World, generator
from shapes.wrong_captions import mutate


def load_vae(folder: Path) -> AutoencoderKL:
    """The committed autoencoder in fp32."""
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def load_tiny(folder: Path) -> AutoencoderTiny:
    """The committed fast decoder in fp32."""
    return AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def autoencoder(folder: Path, judged: World) -> dict[str, float]:
    """Share of reconstructions that the oracle still reads right, also from slightly noisy latents."""
    vae = load_vae(folder)
    latents = ae.encode(vae, judged.images(torch.arange(len(judged))))
    noisy = latents + 0.1 * torch.randn(latents.shape, generator=generator(0, 0))
    return {
        "oracle on reconstructions": ae.retention(ae.decode(vae, latents), judged.captions),
        "oracle with latent noise 0.1": ae.retention(ae.decode(vae, noisy), judged.captions),
        "latent std": float(latents.std()),
    }


def tiny_decoder(vae_folder: Path, folder: Path, judged: World) -> dict[str, float]:
    """The same for the fast decoder."""
    vae, tiny = load_vae(vae_folder), load_tiny(folder)
    images = judged.images(torch.arange(len(judged)))
    latents = ae.encode(vae, images)
    return {"oracle on reconstructions": ae.retention(ae.decode_fast(tiny, latents), judged.captions)}


def load_tower(folder: Path) -> CLIP:
    """An open_clip folder in fp32; HPS-style weights have their tensors under ``state_dict``."""
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    model = CLIP(**config["model_cfg"])
    clip_file = folder / "open_clip_model.safetensors"
    if clip_file.exists():
        state = load_file(clip_file)
    else:
        state = torch.load(next(folder.glob("*.pt")), weights_only=True)["state_dict"]
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def tower(folder: Path, judged: World) -> dict[str, float]:
    """How often a tower prefers what is right, on unseen captions (two in five with a held-out pair).

    `picks its caption among 100`, `prefers the right word`: pictures against captions that differ in one attribute;
    `prefers the whole picture`, `prefers the clean picture`: against wrong and against poor versions of the picture.
    """
    model = load_tower(folder)
    words = SimpleTokenizer(context_length=model.context_length)
    rng = np.random.default_rng(0)
    images = judged.images(torch.arange(len(judged)))
    seen = model.encode_image(normalise(images), normalize=True)
    said = model.encode_text(words(judged.captions), normalize=True)
    near = [caption(mutate(scene, rng), int(rng.integers(4))) for scene in judged.scenes]
    mis = model.encode_text(words(near), normalize=True)
    right = (seen * said).sum(1)
    g = generator(0, 0)
    spoiled = {
        "prefers the whole picture": degrade.wrong(images, g),
        "prefers the clean picture": degrade.poor(images, g),
    }
    own = torch.stack([(s @ t.T).argmax(1) == torch.arange(len(s)) for s, t in zip(seen.split(100), said.split(100))])
    scores = {"picks its caption among 100": own, "prefers the right word": right > (seen * mis).sum(1)}
    for name, bad in spoiled.items():
        scores[name] = right > (model.encode_image(normalise(bad), normalize=True) * said).sum(1)
    return {name: float(hits.float().mean()) for name, hits in scores.items()} | {"mean score": float(right.mean())}
