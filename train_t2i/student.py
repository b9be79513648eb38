"""A model to make images with: a run's student at a step, or the teacher with its many guided steps.

Shapes: noise (B, C, H, W); images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train_t2i import build
from train_t2i.checkpoint import RunFolder, run_of
from train_t2i.config import Config, DirectConfig, Settings
from train_t2i.engine import DTYPES
from train_t2i.errors import UserError
from train_t2i.families import Cond, Family, Source
from train_t2i.families.base import alike
from train_t2i.networks import Networks, Role
from train_t2i.randomness import seeded_noise
from train_t2i.sampling import X0At, many_step, many_step_through

Autocast = Callable[[], AbstractContextManager]
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
    step: int | None = None  # of the run; the teacher has none
    run: str | None = None  # the run's folder
    through: Callable[[Cond, Tensor, Tensor], list[Tensor]] | None = None  # (cond, noise, grid): a teacher's states

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], sources: Sequence[Sequence[Source]] = ()) -> Tensor:
        """(B, C, H, W): row i is a function of its prompt, sources and seed alone, as ``torch.Generator('cpu')`` draws noise."""

        def sample(cond: Cond, seeds: Sequence[int]) -> Tensor:
            return self.sample(cond, self._noise(cond, seeds), lambda i: self._noise(cond, seeds, i))

        return self._by_group(sample, prompts, seeds, sources)

    @torch.no_grad()
    def states(
        self, prompts: Sequence[str], seeds: Sequence[int], grid: Tensor, sources: Sequence[Sequence[Source]] = ()
    ) -> list[Tensor]:
        """Where the teacher is, (B, C, H, W), at each of a student's times ``grid`` (N + 1,) but the first; the last is its
        result."""
        through = self.through
        assert through is not None

        def sample(cond: Cond, seeds: Sequence[int]) -> Tensor:
            return torch.stack(through(cond, self._noise(cond, seeds), grid), dim=1)

        return list(self._by_group(sample, prompts, seeds, sources).unbind(1))

    def _by_group(
        self,
        sample: Callable[[Cond, Sequence[int]], Tensor],
        prompts: Sequence[str],
        seeds: Sequence[int],
        sources: Sequence[Sequence[Source]],
    ) -> Tensor:
        """(B, ...): what ``sample(conditioning, seeds)`` makes, rows of equal sources at once."""
        made: dict[int, Tensor] = {}
        for group in alike(sources, len(prompts)):
            told = [sources[row] for row in group] if sources else ()
            cond = self.family.encode([prompts[row] for row in group], self.negative, told)
            made.update(zip(group, sample(cond, [seeds[row] for row in group]), strict=True))
        return torch.stack([made[row] for row in range(len(prompts))])

    def _noise(self, cond: Cond, seeds: Sequence[int], i: int = 0) -> Tensor:
        return seeded_noise([seed + i * RENOISE_OFFSET for seed in seeds], self.latent_shape).to(cond.tokens.device)

    @torch.no_grad()
    def images(self, prompts: Sequence[str], seeds: Sequence[int], sources: Sequence[Sequence[Source]] = ()) -> Tensor:
        return self.family.decode(self.latents(prompts, seeds, sources))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place_on(device: torch.device) -> Callable[[torch.nn.Module, tuple[str, ...]], object]:
    """Networks of one process: whole, on its device."""
    return lambda net, blocks: net.to(device)


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


def number_format(mixed_precision: str, device: torch.device) -> tuple[torch.dtype, Autocast]:
    """What frozen weights are kept in, and the context of network calls: the run's format on a GPU, fp32 elsewhere."""
    dtype = DTYPES[mixed_precision] if device.type == "cuda" else torch.float32
    if dtype == torch.float32:
        return dtype, nullcontext
    return dtype, lambda: torch.autocast(device.type, dtype=dtype)


def saved_settings(record: dict[str, Any], pretrained_model: str | None, vae: str | None) -> Settings:
    """A run's settings as far as its student's images need them: no decoder for rewards, no second set of weights."""
    settings = Settings.from_dict(record["settings"])
    run = dataclasses.replace(
        settings.run, gradient_checkpointing=False, tiny_vae=None, prompt_cache=None, base_quant="none", compile="off"
    )
    if not run.use_lora_gen and not build.trained_parts(settings.method):  # every weight of the generator is saved
        run = dataclasses.replace(run, generator_init=None, xl_ode_pretrain_path=None)
    if pretrained_model is not None:
        run = dataclasses.replace(run, pretrained_model=pretrained_model)
    if vae is not None:
        run = dataclasses.replace(run, vae=vae)
    return dataclasses.replace(settings, run=run)


def load_student(
    run: str,
    step: str = "latest",
    *,
    pretrained_model: str | None = None,
    vae: str | None = None,
    device: torch.device | None = None,
) -> ImageModel:
    """The generator of a run as it was saved.  ``pretrained_model`` says where its base model lies, if it has moved."""
    device = device or default_device()
    path = find_record(run, step)
    parts, record = run_of(path).load(path, [build.ROLE_FOLDERS["generator"]])
    settings = saved_settings(record, pretrained_model, vae)
    dtype, autocast = number_format(settings.run.mixed_precision, device)
    family = build.build_family(settings.run, dtype).to(device)
    generator: tuple[Role, ...] = ("generator",)
    networks = build.assemble(
        settings, family, uses=generator, trains=generator, dtype=dtype, place=place_on(device), autocast=autocast
    )
    tensors = parts[build.ROLE_FOLDERS["generator"]].tensors
    load_saved(networks, tensors.get("ema", tensors["model"]), path, settings.run.pretrained_model)
    method = build.build_method(settings, networks, device, ())
    sft = settings.run.method == "sft"
    guided = sft and settings.run.teacher_cfg != 1
    calls = settings.run.teacher_num_steps * (2 if guided else 1) if sft else settings.run.sample_num_steps
    network = networks.modules[networks.routes["generator"][0]]
    shape = build.latent_shape(family, settings.size_px)
    root, saved_step = run_of(path).root, int(record["step"])
    return ImageModel(
        f"{root.name}@{saved_step}", family, network, shape, calls, "" if guided else None, method.sample, settings,
        step=saved_step, run=str(root),
    )  # fmt: skip


def load_saved(networks: Networks, saved: Mapping[str, Tensor], path: Path, base: str) -> None:
    """Put a checkpoint's weights into the generator.  Raises UserError when the base model is another one."""
    named = networks.named_parameters("generator")
    if named.keys() != saved.keys() or any(named[key].shape != saved[key].shape for key in named):
        raise UserError(
            f"{path}: its weights do not fit the base model {base}",
            "give --pretrained-model, the model that the run was trained from",
        )
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(saved[key])


def load_teacher(run: Config, num_steps: int, cfg: float, *, device: torch.device | None = None) -> ImageModel:
    """The frozen model with ``num_steps`` deterministic steps under classifier-free guidance ``cfg``."""
    device = device or default_device()
    dtype, autocast = number_format(run.mixed_precision, device)
    run = dataclasses.replace(run, method="direct", gradient_checkpointing=False, compile="off")
    settings = build.resolved(Settings(run, DirectConfig()))
    family = build.build_family(settings.run, dtype).to(device)
    networks = build.assemble(
        settings, family, uses=("teacher",), trains=(), dtype=dtype, place=place_on(device), autocast=autocast
    )

    def x0_for(cond: Cond) -> X0At:
        return lambda x, t: networks.x0("teacher", x, t, cond, cfg=cfg)

    def sample(cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]) -> Tensor:
        return many_step(x0_for(cond), family.path, num_steps, noise)

    def through(cond: Cond, noise: Tensor, grid: Tensor) -> list[Tensor]:
        return many_step_through(x0_for(cond), family.path, num_steps, noise, grid)

    shape = build.latent_shape(family, settings.size_px)
    guided = cfg != 1
    return ImageModel(
        "teacher", family, networks.modules["base"], shape, num_steps * (2 if guided else 1), "" if guided else None,
        sample, settings, through=through,
    )  # fmt: skip
