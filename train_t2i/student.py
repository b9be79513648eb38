"""A model to make images with: a run's student at a step, or the teacher with its many guided steps.

Shapes: noise (B, C, H, W); images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train_t2i import build
from train_t2i.checkpoint import RunFolder, run_of
from train_t2i.config import Config, ODEConfig, Settings
from train_t2i.engine import DTYPES
from train_t2i.errors import UserError
from train_t2i.families import Cond, Family
from train_t2i.networks import Role
from train_t2i.randomness import seeded_noise
from train_t2i.sampling import many_step

RENOISE_OFFSET = 1 << 40  # seeds of later steps, apart from those that people give


@dataclass(frozen=True)
class ImageModel:
    """Prompts and seeds -> images; what training verbs sample, evaluate and export."""

    name: str
    family: Family
    network: torch.nn.Module
    latent_shape: tuple[int, int, int]
    num_network_calls: int  # an image, guided calls counted twice
    negative: str | None  # encoded beside the prompt where sampling is guided
    sample: Callable[[Cond, Tensor, Callable[[int], Tensor]], Tensor]
    settings: Settings

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, C, H, W): row i is a function of its prompt and seed alone, as ``torch.Generator('cpu')`` draws noise."""
        cond = self.family.encode(prompts, self.negative)
        device = cond.tokens.device

        def noise(i: int) -> Tensor:
            return seeded_noise([seed + i * RENOISE_OFFSET for seed in seeds], self.latent_shape).to(device)

        return self.sample(cond, noise(0), noise)

    @torch.no_grad()
    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.family.decode(self.latents(prompts, seeds))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_record(run: str, step: str) -> Path:
    """The checkpoint of a run folder (or a step-N.pt itself): ``step`` is a number or ``latest``."""
    path = Path(run)
    if path.suffix == ".pt" and path.is_file():
        return path
    folder = RunFolder(path)
    if not folder.steps():
        raise UserError(f"{run}: no checkpoint of a run in it", "give OUTPUT_DIR/EXP_NAME")
    if step == "latest":
        found = folder.latest()
        if found is None:
            raise UserError(f"{run}: none of its checkpoints is intact", "see log.txt")
        return found
    if not step.isdigit() or int(step) not in folder.steps():
        steps = ", ".join(str(s) for s in folder.steps())
        raise UserError(f"--step {step}: {run} has no such checkpoint", f"it has: {steps}, or latest")
    return folder.record(int(step))


def load_student(run: str, step: str = "latest", *, device: torch.device | None = None) -> ImageModel:
    """The generator of a run as it was saved."""
    device = device or default_device()
    path = find_record(run, step)
    parts, record = run_of(path).load(path, [build.ROLE_FOLDERS["generator"]])
    settings = Settings.from_dict(record["settings"])
    dtype = DTYPES[settings.run.mixed_precision] if device.type == "cuda" else torch.float32
    family = build.build_family(settings.run, dtype).to(device)
    generator: tuple[Role, ...] = ("generator",)
    networks = build.assemble(settings, family, uses=generator, trains=generator, dtype=dtype, device=device)
    saved = parts[build.ROLE_FOLDERS["generator"]].tensors["model"]
    with torch.no_grad():
        for key, parameter in networks.named_parameters("generator").items():
            parameter.copy_(saved[key])
    bare = dataclasses.replace(settings, run=dataclasses.replace(settings.run, gradient_checkpointing=False))
    method = build.build_method(bare, networks, device, ())
    sft = settings.run.method == "sft"
    calls = 2 * settings.run.teacher_num_steps if sft else settings.run.sample_num_steps
    network = networks.modules[networks.routes["generator"][0]]
    shape = build.latent_shape(family, settings.size_px)
    name = f"{Path(run).name}@{record['step']}"
    return ImageModel(name, family, network, shape, calls, "" if sft else None, method.sample, settings)


def load_teacher(run: Config, num_steps: int, cfg: float, *, device: torch.device | None = None) -> ImageModel:
    """The frozen model with ``num_steps`` deterministic steps under classifier-free guidance ``cfg``."""
    device = device or default_device()
    dtype = DTYPES[run.mixed_precision] if device.type == "cuda" else torch.float32
    settings = Settings(dataclasses.replace(run, method="ode", gradient_checkpointing=False), ODEConfig())
    family = build.build_family(settings.run, dtype).to(device)
    networks = build.assemble(settings, family, uses=("teacher",), trains=(), dtype=dtype, device=device)

    def sample(cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        def x0_at(x: Tensor, t: Tensor) -> Tensor:
            return networks.x0("teacher", x, t, cond, cfg=cfg)

        return many_step(x0_at, family.path, num_steps, noise)

    shape = build.latent_shape(family, settings.size_px)
    guided = cfg != 1
    return ImageModel(
        "teacher", family, networks.modules["base"], shape, num_steps * (2 if guided else 1), "" if guided else None,
        sample, settings,
    )  # fmt: skip
