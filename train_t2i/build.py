"""Settings -> family, networks, method: the parts that training and every other verb put together in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewards
from rewards.weights import read_state
from train_t2i import base_quant
from train_t2i.checkpoint import RECORDS, run_of
from train_t2i.config import Config, DMDRConfig, Settings, listed, parse_resolution, resolved_layout, reward_weights
from train_t2i.config_checks import check_shared_out
from train_t2i.errors import UserError
from train_t2i.families import Family, family_of, load_family
from train_t2i.methods import METHODS, Method, RewardTerm, Setting
from train_t2i.networks import AdapterSpec, Networks, Role, build_networks
from train_t2i.prompt_cache import CachedText, PromptCache, check_key
from train_t2i.text_key import text_key

ROLE_FOLDERS: dict[Role, str] = {"generator": "accelerator_1", "guidance": "accelerator_2"}


def resolved(settings: Settings) -> Settings:
    """``auto`` replaced by what it stands for, so that a checkpoint says what it is."""
    run = settings.run
    family = family_of(run.pretrained_model) if run.model_family == "auto" else run.model_family
    check_family_flags(run, family)
    return replace(settings, run=replace(run, model_family=family, layout=resolved_layout(run)))


def check_family_flags(run: Config, family: str) -> None:
    """Raises UserError for a flag that this architecture has no use for."""
    if run.text_length and family == "sdxl":
        raise UserError("--text-length does nothing for sdxl, whose texts have 77 tokens", "leave it out")
    if run.guidance_embed != Config().guidance_embed and family != "flux":
        raise UserError(f"--guidance-embed does nothing for {family}", "it is FLUX.1's: leave it out")


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
        checkpoint_decoder=run.gradient_checkpointing,
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
    """(C, H, W) of one latent.  Raises UserError where the VAE cannot make that size."""
    height, width = size_px
    multiple = family.size_multiple
    if height % multiple or width % multiple:
        raise UserError(
            f"--resolution {width}x{height}: the model takes multiples of {multiple}",
            f"e.g. {max(1, width // multiple) * multiple}",
        )
    return family.latent_channels, height // family.vae_factor, width // family.vae_factor


def adapter_specs(run: Config) -> dict[Role, AdapterSpec]:
    """Guidance: rank R, alpha R.  Generator: rank 2R, alpha 4R (DMDR's published factor of 2)."""
    rank = run.lora_rank
    targets = listed(run.lora_targets)
    return {
        "guidance": AdapterSpec(rank, rank, targets),
        "generator": AdapterSpec(2 * rank, 4 * rank, targets),
    }


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
            load_generator_weights(modules["gen"], source)

    torch.manual_seed(run.seed)  # LoRA factors start the same on every process
    return build_networks(
        family,
        resolved_layout(run),
        adapter_specs(run),
        uses=uses,
        trains=trains,
        dtype=dtype,
        place=place,
        checkpointing=run.gradient_checkpointing,
        base_quant=run.base_quant,
        autocast=autocast,
        prepare=initialise,
    )


def check_base_quant(run: Config, backend: str) -> None:
    """Raises UserError where the frozen weights cannot be quantised: told before anything loads."""
    check_shared_out(run.base_quant, backend)
    if run.base_quant != "none":
        base_quant.library()


def build_method(
    settings: Settings,
    networks: Networks,
    device: torch.device,
    terms: tuple[RewardTerm, ...],
    *,
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
        sample_type=run.sample_type,
        calls_need_all=calls_need_all,
    )
    kind = METHODS[run.method]
    if run.method == "sft":
        return kind(settings.method, setting, run.teacher_num_steps, run.teacher_cfg)
    return kind(settings.method, setting)


# -- rewards ---------------------------------------------------------------------------------------------------------


def reward_files(config: Any) -> dict[str, str]:
    """Reward name -> its weights, for the rewards that are on."""
    if not isinstance(config, DMDRConfig):
        return {}
    return {name: path for name, (path, _) in reward_weights(config).items() if path}


def check_rewards(config: Any) -> list[str]:
    """Look at every reward's file, also of those that this run never reaches; lines that say what was found."""
    try:
        return [f"reward {name}: {rewards.inspect_weights(name, path)}" for name, path in reward_files(config).items()]
    except rewards.RewardError as error:
        raise UserError(str(error)) from None


def check_initial(run: Config) -> None:
    """What a generator starts from is there, told before anything loads."""
    given = {"--generator-init": run.generator_init, "--xl-ode-pretrain-path": run.xl_ode_pretrain_path}
    for name, source in given.items():
        if source is not None and not Path(source).exists():
            raise UserError(
                f"{name} {source}: no such file or folder",
                "give a LoRA, a UNet folder, a state dict or a run's step-N.pt",
            )


def semantic_relative(tower: Any, config: DMDRConfig, seed: int) -> rewards.Reward:
    from rewards.semantic import SemanticRelative

    words = listed(config.srpo_positive), listed(config.srpo_negative)
    return SemanticRelative(tower, *words, k=config.srpo_k, seed=seed)


def build_rewards(
    config: Any, dtype: torch.dtype, device: torch.device, checkpointing: bool, seed: int
) -> tuple[RewardTerm, ...]:
    terms = []
    for name, path in reward_files(config).items():
        try:
            score: Any = rewards.REWARDS[name](path, dtype=dtype, device=device, checkpointing=checkpointing)
        except rewards.RewardError as error:
            raise UserError(str(error)) from None
        short = {"clip": "clip", "hpsv2": "hps"}[name]
        prefix = config.magic_prompt if name == "hpsv2" and not config.srpo else ""
        if name == "hpsv2" and config.srpo:
            score = semantic_relative(score, config, seed)
        _, weight = reward_weights(config)[name]
        terms.append(RewardTerm(short, score, weight, config.reward_margin, prefix))
    return tuple(terms)


# -- initial weights of a generator ----------------------------------------------------------------------------------


def load_generator_weights(net: nn.Module, source: str) -> None:
    """Put ``source`` into a generator: a few-step LoRA (fused), a UNet folder, a state dict, or a run's step-N.pt."""
    state = _state_of(Path(source))
    if any(".lora" in key or "lora_" in key for key in state):
        _fuse_lora(net, state, source)
        return
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: not weights of this generator ({first})", "give weights of the same model"
        ) from None


def _state_of(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt" and path.parent.name == RECORDS:
        parts, record = run_of(path).load(path, [ROLE_FOLDERS["generator"]])
        if record["settings"]["use_lora_gen"]:
            raise UserError(f"{path}: its generator is a LoRA", "give its export, or continue it with --resume-ckpt")
        return dict(parts[ROLE_FOLDERS["generator"]].tensors["model"])
    if (path / "adapter_config.json").is_file():
        return _peft_adapter(path)
    if path.is_dir():
        folder = path / "unet" if (path / "unet").is_dir() else path
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not files:
            raise UserError(f"{path}: holds no weights", "give a UNet folder, a state dict or a run's step-N.pt")
        return {key: tensor for file in files for key, tensor in _read(file).items()}
    return _read(path)


def _peft_adapter(folder: Path) -> dict[str, Tensor]:
    """An adapter as peft saves it (a run's ``lora_gen/step-N``) in diffusers' names, its factor folded into B."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        factor = config["lora_alpha"] / config["r"]
        plain = not (config.get("use_rslora") or config.get("use_dora"))
        plain = plain and not (config.get("rank_pattern") or config.get("alpha_pattern"))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}: its adapter_config.json cannot be used ({error})", "save the adapter again"
        ) from None
    if not plain:
        raise UserError(f"{folder}: only plain LoRA of one rank is understood", "merge it into a UNet folder first")
    state = _read(folder / "adapter_model.safetensors")
    named = {"unet." + key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    return {key: tensor * factor if ".lora_B." in key else tensor for key, tensor in named.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_state(path)
    except rewards.RewardError as error:
        raise UserError(str(error)) from None


def _fuse_lora(net: Any, state: dict[str, Tensor], source: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    before = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        lora, alphas = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=net.config)
        net.load_lora_adapter(lora, network_alphas=alphas, prefix="unet", adapter_name="init")
    except Exception as error:  # converters raise whatever a foreign file makes them
        raise UserError(f"{source}: not a LoRA of this generator ({' '.join(str(error).split())[:200]})") from None
    net.fuse_lora()
    net.unload_lora()
    if all(torch.equal(before[key], value) for key, value in net.state_dict().items()):
        raise UserError(f"{source}: this LoRA changes nothing", "it names no layer of this model")
