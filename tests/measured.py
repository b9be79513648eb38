"""What a computation on the CPU allocates, as torch's profiler saw it, and the tick of a small run to measure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from train_t2i import build, reward_terms
from train_t2i.config import DMDRConfig, Settings
from train_t2i.engine import DTYPES
from train_t2i.families import Cond
from train_t2i.methods import METHODS
from train_t2i.methods.base import Batch, Clock
from train_t2i.plan.model import empty_family, published_of
from train_t2i.plan.rehearsal import last_tick


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes alive at once among those that ``call`` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def full_texts(settings: Settings, dtype: torch.dtype) -> dict[bool, Cond]:
    """Random conditionings as long as texts can be, with a negative and without: what a plan reckons with."""
    _, published = published_of(settings.run, None)
    empty = empty_family(published, settings.run, dtype).family

    def filled(cond: Cond) -> Cond:
        def fill(part: Any) -> Any:
            return None if part is None else torch.randn(part.shape, dtype=part.dtype)

        negative = None if cond.negative is None else filled(cond.negative)
        return replace(
            cond, tokens=fill(cond.tokens), pooled=fill(cond.pooled), negative=negative, guidance=fill(cond.guidance)
        )

    prompts = ["a prompt"] * settings.run.batch_size
    return {bare: filled(empty.encode(prompts, None if bare else "")) for bare in (True, False)}


@dataclass
class Real:
    """The networks, method and rewards of a run on real tensors, told texts as long as they can be."""

    settings: Settings
    networks: Any
    method: Any
    terms: tuple[Any, ...]

    def batch(self) -> Batch:
        run, shape = self.settings.run, self.latent_shape
        rows = range(run.batch_size)
        images, latents = torch.rand(run.batch_size, 3, *self.settings.size_px), torch.randn(run.batch_size, *shape)
        return Batch(
            rows, [f"red circle {i}" for i in rows], rows=rows, images=images, seeds=rows, latents=latents,
            rand_devices=["cpu"] * run.batch_size, num_steps=[run.sample_num_steps] * run.batch_size,
        )  # fmt: skip

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return build.latent_shape(self.networks.family, self.settings.size_px)


def real_run(settings: Settings) -> Real:
    run, dtype = settings.run, DTYPES[settings.run.mixed_precision]
    settings = build.resolved(settings)
    family, kind = build.build_family(settings.run, dtype), METHODS[run.method]
    low = dtype != torch.float32
    networks = build.assemble(
        settings, family, uses=kind.uses, trains=kind.trains, dtype=dtype, place=lambda net, blocks: None,
        autocast=(lambda: torch.autocast("cpu", dtype=dtype)) if low else nullcontext,
    )  # fmt: skip
    device = torch.device("cpu")
    terms = reward_terms.build_terms(settings.method, dtype, device, "rewards" in run.recomputed, run.seed)
    method = build.build_method(settings, networks, device, terms)
    told = full_texts(settings, dtype)
    family.encode = lambda prompts, negative=None, sources=(): told[negative is None]  # type: ignore[method-assign]
    return Real(settings, networks, method, terms)


def counted_step(settings: Settings) -> int:
    """FLOPs of one whole step, all its ticks and all that is made a second time, as torch's own counter sees them.

    Attention is made of its products: the CPU's fused kernel would compute one of them twice.
    """
    real = real_run(settings)
    ticks = settings.method.ratio_update if isinstance(settings.method, DMDRConfig) else 1
    step = settings.run.max_train_steps - 1
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for tick in range(ticks):
            clock, batch = Clock(step * ticks + tick, step, tick), real.batch()
            batch = replace(batch, prompts=[f"{prompt} of tick {tick}" for prompt in batch.prompts])
            rollout = real.method.rollout(batch, clock)
            for role in real.method.roles_at(clock):
                with real.networks.updating(role):
                    for loss, _ in real.method.losses(role, rollout, clock):
                        loss.backward()
    return counter.get_total_flops()


def measured_tick(settings: Settings) -> dict[str, int]:
    """Peak bytes of the rollout, of each role's update and of the sample images, on real tensors."""
    real = real_run(settings)
    run, clock, batch = settings.run, last_tick(settings), real.batch()
    networks, method, family = real.networks, real.method, real.networks.family
    rollout = method.rollout(batch, clock)
    for term in real.terms:
        term.score(torch.rand(run.batch_size, 3, *settings.size_px), term.prompts(batch.prompts), tick=clock.tick)
    found = {"rollout": peak_bytes(lambda: method.rollout(batch, clock))}
    for role in method.roles_at(clock):

        def update(role: Any = role) -> None:
            with networks.updating(role):
                for loss, _ in method.losses(role, rollout, clock):
                    loss.backward()

        found[role] = peak_bytes(update)
        for parameter in networks.parameters(role):
            parameter.grad = None
    with torch.no_grad():
        found["sheet"] = peak_bytes(lambda: family.decode(torch.randn(run.batch_size_test, *real.latent_shape)))
    return found
