"""One tick of training, rehearsed on meta tensors: the trainer's own networks, method and rewards, counted by a ledger."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewards.tower
from rewards.semantic import SemanticRelative
from train_t2i import build, on_host, reward_terms
from train_t2i.base_quant import quantized_layers
from train_t2i.config import DMDRConfig, Settings, resolved_layout
from train_t2i.engine import DTYPES
from train_t2i.families.published import Published
from train_t2i.methods import METHODS
from train_t2i.methods.base import Batch, Clock, RewardTerm
from train_t2i.networks import Networks, Role
from train_t2i.plan.ledger import Elsewhere, Ledger, Peak, like_a_gpu, replaced
from train_t2i.plan.model import META, empty_family
from train_t2i.plan.work import Counter, Work
from train_t2i.reward_flags import monitor_paths


@dataclass(frozen=True)
class Piece:
    """``count`` parameters of a shape, as sharding sees them: rows of a width, inside a block or not, trained by a role."""

    rows: int
    width: int
    inside: bool
    role: str | None
    count: int


@dataclass(frozen=True)
class ModuleBytes:
    """One network of a run: its weights without adapters, and what sharding has to gather of them."""

    frozen_bytes: int
    num_quantizable: int  # frozen elements that --base-quant would keep as codes, and does not yet
    num_elements: int
    block_bytes: int  # largest block, in the format of the network calls
    outside_bytes: int  # all that lies outside blocks, likewise
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Simulation:
    """Calls of the generator that a step's simulations make: of a row on average, and where every process makes all."""

    mean: float
    all: int


@dataclass(frozen=True)
class Rehearsal:
    """What a run keeps, and what its updates take on top, for one device that has everything."""

    modules: dict[str, ModuleBytes]
    trained: dict[Role, int]  # elements a trained role
    encoder_bytes: int
    vae_bytes: int  # with the tiny decoder
    reward_bytes: int
    rollout: Peak
    updates: dict[Role, Peak]
    sheet: Peak  # drawing sample images
    work: dict[str, Work] = field(default_factory=dict)  # "rollout" and each role: what a micro-batch computes
    times: dict[str, int] = field(default_factory=dict)  # how often each is in a step
    simulation: Simulation | None = None  # where the rollout is one: its work is then that of a single call
    waiting_bytes: int = 0  # in the host's memory: the most that an update's networks keep there
    averaged: int = 0  # elements that have a moving average


def rehearse(settings: Settings, found: Published, *, gradient_share: float, gathered: bool) -> Rehearsal:
    """``gathered``: weights are sharded, and come in the format of the network calls (FSDP2's mixed precision)."""
    run = settings.run
    dtype = DTYPES[run.mixed_precision]
    shapes = empty_family(found, run, dtype)
    with ExitStack() as stack:
        call = stack.enter_context(like_a_gpu())
        elsewhere = Elsewhere()
        stack.enter_context(replaced(on_host, "to_host", elsewhere.hooks))
        autocast = nullcontext if dtype == torch.float32 else partial(call, dtype)
        networks = empty_networks(settings, shapes.family, dtype, autocast)
        modules = {name: module_bytes(net, networks, name, dtype) for name, net in networks.modules.items()}
        trained = {role: sum(p.numel() for p in networks.parameters(role)) for role in networks.trains}
        if gathered:
            for net in networks.modules.values():
                _cast(net, dtype)
        terms, watched = empty_rewards(settings, dtype)
        method = build.build_method(settings, networks, META, terms)
        averaged = trained["generator"] if method.ema_decay(run.max_train_steps) is not None else 0
        with Counter(shapes.family, networks.modules) as counter:
            rollout, updates, work, waiting = tick(settings, networks, method, gradient_share, counter, elsewhere)
        sheet = draw_sheet(settings, networks)
    family = shapes.family
    coders = [part for part in (family.vae, family.tiny) if part is not None]
    towers = [tower_of(term.score).model for term in terms] + [tower.model for tower in watched]
    return Rehearsal(
        modules, trained, shapes.num_encoder_parameters * dtype.itemsize, sum(map(weight_bytes, coders)),
        sum(map(weight_bytes, towers)), rollout, updates, sheet, work, times_in_a_step(settings, method), simulation(settings), waiting,
        averaged,
    )  # fmt: skip


def tower_of(score: Any) -> Any:
    """The reward that holds the weights."""
    return score.tower if isinstance(score, SemanticRelative) else score


def weight_bytes(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters()) + sum(b.nbytes for b in net.buffers())


def empty_networks(settings: Settings, family: Any, dtype: torch.dtype, autocast: Any) -> Networks:
    """The roles of the run, on its layout; what a generator starts from changes no size."""
    layout, kind = resolved_layout(settings.run), METHODS[settings.run.method]
    bare = replace(settings.run, layout=layout, generator_init=None, xl_ode_pretrain_path=None, compile="off")
    with META:
        return build.assemble(
            replace(settings, run=bare), family, uses=kind.uses, trains=kind.trains, dtype=dtype,
            place=lambda net, blocks: None, autocast=autocast,
        )  # fmt: skip


def module_bytes(net: nn.Module, networks: Networks, name: str, dtype: torch.dtype) -> ModuleBytes:
    full = any(networks.routes[role] == (name, None) for role in networks.trains)
    adapters = {id(p) for role in networks.trains for p in networks.parameters(role)} if not full else set()
    base = [p for p in net.parameters() if id(p) not in adapters]
    blocks = [m for m in net.modules() if type(m).__name__ in networks.family.block_names]
    inside = {id(p) for block in blocks for p in block.parameters()}
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    outside = sum(p.numel() for p in net.parameters() if id(p) not in inside)
    linear = () if full else quantizable(net, networks.family.block_names)
    frozen = 0 if full else sum(p.numel() * p.element_size() for p in base) + sum(b.nbytes for b in net.buffers())
    total = sum(p.numel() for p in net.parameters())
    pieces = pieces_of(net, networks, inside)
    return ModuleBytes(frozen, sum(linear), total, largest * dtype.itemsize, outside * dtype.itemsize, pieces)


def pieces_of(net: nn.Module, networks: Networks, inside: set[int]) -> tuple[Piece, ...]:
    owners = {id(p): role for role in networks.trains for p in networks.parameters(role)}
    counted = Counts(
        (p.shape[0] if p.ndim else 1, p.numel() // (p.shape[0] if p.ndim else 1), id(p) in inside, owners.get(id(p)))
        for p in net.parameters()
    )
    return tuple(Piece(*kind, count) for kind, count in counted.items())


def quantizable(net: nn.Module, block_names: Sequence[str]) -> list[int]:
    """Elements of each linear layer in the blocks, those under an adapter too."""
    names = [name for name in quantized_layers(net, block_names) if ".lora_" not in name]
    return [net.get_submodule(name).weight.numel() for name in names]  # type: ignore[operator]


def _cast(net: nn.Module, dtype: torch.dtype) -> None:
    for parameter in net.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def empty_rewards(settings: Settings, dtype: torch.dtype) -> tuple[tuple[RewardTerm, ...], list[Any]]:
    """(the run's rewards, those it only watches), without weights: those that are towers.

    A file that is not here yet is taken for the published ViT-H-14.
    """
    method, run, resolve = settings.method, settings.run, rewards.tower.resolve

    def resolved(weights: str, spec: Any) -> Any:
        if Path(weights).expanduser().exists():
            return resolve(weights, spec)
        size = rewards.tower.Preprocess((224, 224), spec.resize_mode)
        return rewards.tower.Source(Path(weights), rewards.tower.VIT_H_14 | {"quick_gelu": spec.quick_gelu}, size)

    def load(source: Any, dtype: torch.dtype, device: torch.device) -> Any:
        return rewards.tower.empty_model(source, dtype).eval().requires_grad_(False)

    with replaced(rewards.tower, "resolve", resolved), replaced(rewards.tower, "load_model", load):
        terms = reward_terms.build_terms(
            method, dtype, META, "rewards" in run.recomputed, run.seed, only=rewards.TOWERS
        )
        paths = monitor_paths(method) if isinstance(method, DMDRConfig) else {}
        return terms, [
            reward_terms.build_reward(name, path, dtype, META, False)
            for name, path in paths.items()
            if name in rewards.TOWERS
        ]


def last_tick(settings: Settings) -> Clock:
    """A tick that updates all roles, with the rewards in the loss if the run ever reaches them."""
    method, last = settings.method, settings.run.max_train_steps - 1
    if not isinstance(method, DMDRConfig):
        return Clock()
    return Clock(tick=last * method.ratio_update, step=last, tick_in_step=method.ratio_update - 1)


def empty_batch(settings: Settings, networks: Networks) -> Batch:
    run = settings.run
    rows, shape = run.batch_size, build.latent_shape(networks.family, settings.size_px)
    count = range(rows)
    images = torch.empty(rows, 3, *settings.size_px, device=META)
    latents = torch.empty(rows, *shape, device=META)
    states = torch.empty(rows, run.sample_num_steps - 1, *shape, device=META)
    return Batch(
        count, [f"prompt {i}" for i in count], rows=count, images=images, seeds=count, rand_devices=["cpu"] * rows,
        num_steps=[run.sample_num_steps] * rows, latents=latents, states=states,
    )  # fmt: skip


def times_in_a_step(settings: Settings, method: Any) -> dict[str, int]:
    """How many ticks of a step there are, and in how many of them each role is updated."""
    ticks = settings.method.ratio_update if isinstance(settings.method, DMDRConfig) else 1
    updated = [role for i in range(ticks) for role in method.roles_at(Clock(tick=i, tick_in_step=i))]
    return {"rollout": ticks, **{role: updated.count(role) for role in method.trains}}


def simulation(settings: Settings) -> Simulation | None:
    """DMDR's: levels drawn evenly; along the ODE to the end; ``reuse_rollout`` saves one call a row."""
    method, num_steps = settings.method, settings.run.sample_num_steps
    if not isinstance(method, DMDRConfig):
        return None
    mean = float(num_steps) if settings.run.sample_type == "ode" else (num_steps + 1) / 2
    ticks, saved = method.ratio_update, int(method.reuse_rollout)
    return Simulation(ticks * mean - saved, ticks * num_steps - saved)


def one_call(settings: Settings, networks: Networks, batch: Batch, counter: Counter) -> Work:
    """Of the generator, without a graph, by all rows: what a simulation is made of."""
    rows, shape = settings.run.batch_size, build.latent_shape(networks.family, settings.size_px)
    x, t = torch.empty(rows, *shape, device=META), torch.empty(rows, device=META)
    counter.take()
    networks.x0("generator", x, t, networks.family.encode(batch.prompts, None))
    return counter.take()


def tick(
    settings: Settings, networks: Networks, method: Any, gradient_share: float, counter: Counter, elsewhere: Elsewhere
) -> tuple[Peak, dict[Role, Peak], dict[str, Work], int]:
    """Peaks and FLOPs of the rollout and of each role's update, and the most that an update keeps elsewhere.

    With several micro-batches an update's gradients are there from the start of the last.
    """
    run, clock, batch = settings.run, last_tick(settings), empty_batch(settings, networks)
    with Ledger() as ledger:
        rollout = method.rollout(batch, clock)
    updates: dict[Role, Peak] = {}
    waiting = 0
    simulates = isinstance(settings.method, DMDRConfig)
    work = {"rollout": one_call(settings, networks, batch, counter) if simulates else counter.take()}
    for role in method.roles_at(clock):
        parameters = networks.parameters(role)
        micro_batches = run.gradient_accumulation_steps * method.parts
        before = elsewhere.bytes
        with Ledger(parameters, gradient_share, held=micro_batches > 1) as update, networks.updating(role):
            for loss, _ in method.losses(role, rollout, clock):
                torch.autograd.backward(loss)
                del loss
        updates[role], work[role] = update.peak, counter.take()
        waiting = max(waiting, (elsewhere.bytes - before) // method.parts)  # each part's own backward ends it
        for parameter in parameters:
            parameter.grad = None
    return ledger.peak, updates, work, waiting


@torch.no_grad()
def draw_sheet(settings: Settings, networks: Networks) -> Peak:
    """Decoding the sample images: all at once, by the whole VAE."""
    run = settings.run
    if not run.sample_steps:
        return Peak()
    latents = torch.empty(run.batch_size_test, *build.latent_shape(networks.family, settings.size_px), device=META)
    with Ledger() as ledger:
        networks.family.decode(latents)
    return ledger.peak
