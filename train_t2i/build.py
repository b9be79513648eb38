"""Settings -> family, networks, method: the parts that training and every other verb put together in the same way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train_t2i import base_quant, compiled
from train_t2i.adapters import AdapterSpec
from train_t2i.config import (
    EDIT_FAMILIES,
    Config,
    Settings,
    SFTConfig,
    listed,
    parse_resolution,
    resolved_layout,
)
from train_t2i.config_checks import check_acts, check_backend
from train_t2i.errors import UserError
from train_t2i.families import Family, family_class, family_of, load_family
from train_t2i.initial_weights import TAKES, check_whole, load_generator_weights
from train_t2i.methods import METHODS, Method, RewardTerm, Setting
from train_t2i.networks import Networks, Role, build_networks
from train_t2i.prompt_cache import CachedText, PromptCache, check_key
from train_t2i.text_key import text_key

ROLE_FOLDERS: dict[Role, str] = {"generator": "accelerator_1", "guidance": "accelerator_2"}


def resolved(settings: Settings) -> Settings:
    """``auto`` replaced by what it stands for, so that a checkpoint says what it is."""
    run = settings.run
    family = family_of(run.pretrained_model) if run.model_family == "auto" else run.model_family
    check_family_flags(run, family)
    settings = replace(settings, run=replace(run, model_family=family, layout=resolved_layout(run)))
    check_acts(settings)
    return settings


def check_family_flags(run: Config, family: str) -> None:
    """Raises UserError for a flag that this architecture has no use for, or that its exported pipeline would refuse."""
    if run.text_length and family == "sdxl":
        raise UserError("--text-length does nothing for sdxl, whose texts have 77 tokens", "leave it out")
    if run.text_length > (limit := family_class(family).max_text_length):
        raise UserError(
            f"--text-length {run.text_length}: the pipeline of {family} takes at most {limit}", f"e.g. {limit}"
        )
    if run.guidance_embed != Config().guidance_embed and family != "flux":
        raise UserError(f"--guidance-embed does nothing for {family}", "it is FLUX.1's: leave it out")
    if family in EDIT_FAMILIES and run.text_length:
        raise UserError(f"--text-length does nothing for {family}, which cuts nothing off", "leave it out")
    if family in EDIT_FAMILIES and run.prompt_cache:
        raise UserError(f"--prompt-cache: the texts of {family} are read beside their sources", "leave it out")


def build_family(run: Config, dtype: torch.dtype) -> Family:
    """The run's family; with a prompt cache, which must be of the same encoders, these are not loaded."""
    family = load_family(
        run.model_family,
        run.pretrained_model,
        dtype=dtype,
        vae=run.vae,
        tiny_vae=run.tiny_vae,
        shift=run.shift or None,
        size_px=parse_resolution(run.resolution),
        text_length=run.text_length or None,
        guidance=run.guidance_embed,
        checkpoint_decoder="decoder" in run.recomputed,
        encoders=run.prompt_cache is None,
    )
    if run.prompt_cache is None:
        return family
    cached: Any = CachedText(family, PromptCache(run.prompt_cache))
    cached.compared = check_key(cached.cache, cache_key(family, run, dtype))
    return cached


def cache_key(family: Family, run: Config, dtype: torch.dtype) -> dict[str, Any]:
    """All that decides an embedding besides its prompt."""
    return {**text_key(family, run.pretrained_model), "dtype": str(dtype).removeprefix("torch.")}


def latent_shape(family: Family, size_px: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of one latent.  Raises UserError for a size that the VAE or the network cannot make."""
    height, width = size_px
    multiple = family.size_multiple
    if height % multiple or width % multiple:
        raise UserError(
            f"--resolution {width}x{height}: the model takes multiples of {multiple}",
            f"e.g. {max(1, width // multiple) * multiple}",
        )
    limit = family.max_side_px
    if limit is not None and max(size_px) > limit:
        raise UserError(
            f"--resolution {width}x{height}: the model takes at most {limit} pixels a side",
            f"e.g. {min(width, limit)}x{min(height, limit)}",
        )
    return family.latent_channels, height // family.vae_factor, width // family.vae_factor


def adapter_specs(run: Config, family: Family) -> dict[Role, AdapterSpec]:
    """Guidance: rank R, alpha R.  Generator: the same, but DMDR's of rank 2R, alpha 4R (its published factor of 2)."""
    rank, named = run.lora_rank, listed(run.lora_targets)
    targets = named or METHODS[run.method].lora_targets(family)
    generator = (2 * rank, 4 * rank) if run.method == "dmdr" else (rank, rank)
    return {"guidance": AdapterSpec(rank, rank, named), "generator": AdapterSpec(*generator, targets)}


def assemble(
    settings: Settings,
    family: Family,
    *,
    uses: tuple[Role, ...],
    trains: tuple[Role, ...],
    dtype: torch.dtype,
    place: Callable[[nn.Module, tuple[str, ...]], object],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Networks:
    """The networks of a run before any training, its generator initialised where the settings say so."""
    run = settings.run
    source = run.generator_init or run.xl_ode_pretrain_path

    def initialise(modules: dict[str, nn.Module]) -> None:
        if source is not None:
            check_initial(run)
            load_generator_weights(family, modules["gen"], source, ROLE_FOLDERS["generator"])

    torch.manual_seed(run.seed)  # LoRA factors start the same on every process
    return build_networks(
        family,
        resolved_layout(run),
        adapter_specs(run, family),
        uses=uses,
        trains=trains,
        dtype=dtype,
        place=place,
        checkpointing="networks" in run.recomputed,
        keeps_on_host=run.keeps_on_host,
        compiled=run.compile == "blocks",
        base_quant=run.base_quant,
        autocast=autocast,
        prepare=initialise,
        adapt=lambda net, adapter: METHODS[run.method].adapt(net, adapter, settings.method),
        named=trained_parts(settings.method),
    )


def trained_parts(method: Any) -> tuple[str, ...]:
    """Parts of the names of what supervised training trains; none: everything."""
    if not isinstance(method, SFTConfig) or not method.trainable_modules:
        return ()
    return listed(method.trainable_modules) + listed(method.trainable_modules_low_learning_rate)


def check_started(settings: Settings, backend: str, device: torch.device) -> None:
    """Raises UserError for what cannot run here: told before anything loads, when it is known which ``backend`` it is."""
    check_backend(settings, backend)
    if settings.run.compile != "off":
        compiled.check_compiler(device)
    if settings.run.base_quant != "none":
        base_quant.library()


def build_method(
    settings: Settings,
    networks: Networks,
    device: torch.device,
    terms: tuple[RewardTerm, ...],
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    calls_need_all: bool = False,
) -> Method:
    run, family = settings.run, networks.family
    setting = Setting(
        networks=networks,
        family=family,
        grid=family.path.grid(run.sample_num_steps),
        latent_shape=latent_shape(family, settings.size_px),
        seed=run.seed,
        device=device,
        rewards=terms,
        features=features,
        sample_type=run.sample_type,
        calls_need_all=calls_need_all,
        least_rows=1 if run.compile == "off" else 2,
    )
    kind = METHODS[run.method]
    if run.method == "sft":
        return kind(settings.method, setting, run.teacher_num_steps, run.teacher_cfg)
    return kind(settings.method, setting)


def check_initial(run: Config) -> None:
    """What a generator starts from is there, told before anything loads."""
    given = {"--generator-init": run.generator_init, "--xl-ode-pretrain-path": run.xl_ode_pretrain_path}
    for name, source in given.items():
        if source is not None and not Path(source).exists():
            raise UserError(f"{name} {source}: no such file or folder", f"give {TAKES}")


def check_start(run: Config) -> None:
    """A run that begins is given the whole of what it is to go on from."""
    check_initial(run)
    if source := run.generator_init or run.xl_ode_pretrain_path:
        check_whole(source)
