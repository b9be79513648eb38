"""What a chosen recipe would need, and whether it is here: the checks that the trainer begins with, and the plan's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from train_t2i import base_quant, build, plan, reward_terms
from train_t2i.checkpoint import RunFolder
from train_t2i.config import Config, DMDRConfig, Settings
from train_t2i.doctor import machine, weights
from train_t2i.doctor.findings import Finding, looked
from train_t2i.doctor.installation import version_of
from train_t2i.errors import UserError
from train_t2i.families.published import Published
from train_t2i.feed import dataset_for
from train_t2i.initial_weights import check_whole
from train_t2i.methods import METHODS
from train_t2i.plan.estimate import FP32_BYTES, Plan, adam_bytes, estimate
from train_t2i.plan.model import published_of
from train_t2i.plan.rehearsal import Rehearsal
from train_t2i.prompt_cache import PromptCache
from train_t2i.resume import find_checkpoint
from train_t2i.reward_flags import monitor_paths
from train_t2i.rows import Rejects


def examine(config: plan.PlanConfig, settings: Settings) -> Iterator[Finding]:
    """One line a need that is met, one a problem; a look that fails stops no other."""
    yield from looked("packages", lambda: packages(settings))
    yield from looked("models", lambda: models(settings.run))
    yield from rewards(settings)
    run, name = settings.run, config.model or ("sdxl" if Path(settings.run.pretrained_model).is_file() else None)
    try:
        called, published = published_of(run, name)
    except UserError as error:  # it may run all the same
        yield Finding("recipe", f"what it needs is not known: {error}")
        yield from looked("run folder", lambda: run_folder(run, machine.LEAST_FREE_BYTES))
        return
    settings = replace(settings, run=replace(run, model_family=published.family))
    published = replace(published, num_sources=config.num_sources)
    yield from looked("data", lambda: data(settings))
    yield from looked("recipe", lambda: sizes(config, settings, called, published))


# -- what has to be here ---------------------------------------------------------------------------------------------


def packages(settings: Settings) -> Iterator[Finding]:
    """Optional ones that this run cannot do without."""
    run = settings.run
    for name, wanted in {
        "deepspeed": run.backend.startswith("zero"), "bitsandbytes": run.use_8bit_adam,
        "datasets": run.data_path_train.startswith("hub:"),
    }.items():  # fmt: skip
        if wanted and version_of(name) is None:
            yield Finding(name, "is not installed, and this recipe needs it", f"uv sync --frozen --extra {name}")
    if run.base_quant != "none":
        base_quant.library()


def models(run: Config) -> Iterator[Finding]:
    """The teacher's weights, and what replaces or starts parts of it."""
    given = {
        "--pretrained-model": run.pretrained_model, "--vae": run.vae, "--tiny-vae": run.tiny_vae,
        "--generator-init": run.generator_init, "--xl-ode-pretrain-path": run.xl_ode_pretrain_path,
    }  # fmt: skip
    for name, source in given.items():
        if source is not None:
            yield from looked(name, partial(model, name, source))
    if run.prompt_cache is not None:
        cache = run.prompt_cache
        yield from looked("prompt cache", lambda: [Finding("prompt cache", f"{cache}: {len(PromptCache(cache))} rows")])


def model(name: str, source: str) -> Iterator[Finding]:
    """A file, a folder, or what a hub id has left on the disk.  Raises UserError, RewardError."""
    starts = name in ("--generator-init", "--xl-ode-pretrain-path")
    if Path(source).exists():
        if starts:
            check_whole(source)
        yield from weights.look_at(name, Path(source), digests=False)
        return
    if starts:
        raise UserError(f"{source}: no such file or folder", "check the path, or fetch it: python -m train_t2i fetch")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, local_files_only=True))
    except HFValidationError:
        raise UserError(f"{source}: no such file or folder, and no hub id", "check the path") from None
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            way_out = "unset HF_HUB_OFFLINE, or give a folder that is here"
            raise UserError(f"{source}: is not here, and HF_HUB_OFFLINE is set", way_out) from None
        yield Finding(name, f"{source}: is not here; it is downloaded from the hub at the first start")
        return
    yield from weights.look_at(name, folder, digests=False)


def rewards(settings: Settings) -> Iterator[Finding]:
    """Each reward model's weights, with the size and the choices that they imply."""
    method, asked = settings.method, []
    try:
        asked = [(*one, "--extra-rewards") for one in reward_terms.asked_for(method)]
        if isinstance(method, DMDRConfig):
            asked += [(f"monitor {key}", key, path, "--monitor-rewards") for key, path in monitor_paths(method).items()]
    except UserError as error:
        yield Finding("rewards", error.message, error.hint)
    for role, name, path, option in asked:
        yield from looked(role, partial(reward, role, option, name, path))


def reward(role: str, option: str, name: str, path: str | None) -> list[Finding]:
    return [Finding(role, str(reward_terms.look_at(option, name, path)))]


def data(settings: Settings) -> Iterator[Finding]:
    """Rows that a run would train on, read as it reads them."""
    run = settings.run
    rejects = Rejects(Path(run.output_dir) / "rejected.jsonl", run.max_bad_fraction, writes=False)
    rows = dataset_for(METHODS[run.method].data, settings, rejects)
    yield Finding("data", f"{run.data_path_train}: {len(rows)} rows")


# -- what it takes ---------------------------------------------------------------------------------------------------


def sizes(config: plan.PlanConfig, settings: Settings, name: str, published: Published) -> Iterator[Finding]:
    """Memory a device and room for a checkpoint, as ``plan`` counts them.  Raises UserError."""
    run, world = settings.run, config.num_processes
    build.check_family_flags(run, published.family)
    plan.check_sources(config, published.family)
    found = plan.rehearsed(settings, published, world)
    taken = estimate(run, found, world)
    kept = checkpoint_bytes(run, found)
    processes = f"{world} process{'es' * (world > 1)}, {run.backend}"
    yield Finding(
        "recipe",
        f"{name}: {run.method}, {run.resolution} px, batch {run.batch_size}, {processes}: "
        f"{machine.gb(taken.total)} on each device, {machine.gb(kept)} a checkpoint",
    )
    yield from fits(run, world, taken)
    yield from looked("run folder", lambda: run_folder(run, kept))
    if not Path(run.pretrained_model).exists():
        yield from looked("downloads", lambda: downloads(run, found))


def fits(run: Config, world: int, taken: Plan) -> Iterator[Finding]:
    """Against the GPUs that are here, or the memory of a machine that has none."""
    free = machine.gpu_free_bytes()
    less = "python -m train_t2i plan with the same flags names what to turn down"
    if free and world > len(free):
        yield Finding("devices", f"{world} processes, and {len(free)} GPUs here", "--num-processes, or more machines")
    if free and min(free) < taken.total:
        short = f"needs {machine.gb(taken.total)} on each GPU, and {machine.gb(min(free))} are free on one of them"
        yield Finding("devices", short, less)
    available = machine.memory_bytes()[1]
    host = sum(taken.host.values())
    waiting = host * min(world, len(free))
    if waiting > available:
        what = " and ".join(taken.host)
        short = f"{what} that wait on the host take {machine.gb(waiting)}, and {machine.gb(available)} are available"
        yield Finding("memory", short, "leave out --offload-optimizer or --gradient-checkpointing host")
    needed = (taken.total - taken.reserve + host) * world
    if not free and needed > available:
        short = f"needs {machine.gb(taken.total)} on each device; no GPU is here, and {machine.gb(available)} of memory"
        yield Finding("devices", short, "run it where the GPUs are: the plan is for one like them")


def checkpoint_bytes(run: Config, found: Rehearsal) -> int:
    """Weights in fp32 and the optimizer's state of all roles that are trained."""
    return int(sum(found.trained.values()) * (FP32_BYTES + adam_bytes(run)))


def run_folder(run: Config, needed_bytes: int) -> Iterator[Finding]:
    """Where the run is written: room, permission, and what it would go on from.  Raises UserError."""
    folder = RunFolder(Path(run.output_dir) / run.exp_name)
    room = max(needed_bytes, machine.LEAST_FREE_BYTES)
    yield from machine.disk("run folder", folder.root, room, "a checkpoint")
    if (path := find_checkpoint(run, folder)) is not None:
        yield Finding("goes on from", str(path))


def downloads(run: Config, found: Rehearsal) -> Iterator[Finding]:
    """Room for the teacher in two bytes a number, the least that a repository holds."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(run.pretrained_model, local_files_only=True)
    except LocalEntryNotFoundError:
        least = 2 * max(module.num_elements for module in found.modules.values()) + found.encoder_bytes
        yield from machine.disk("downloads", Path(constants.HF_HUB_CACHE), least, run.pretrained_model)
