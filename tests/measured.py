"""What a computation on the CPU allocates, as torch's profiler saw it, and the tick of a small run to measure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from train_t2i import build, reward_terms
from train_t2i.config import Settings
from train_t2i.engine import DTYPES
from train_t2i.families import Cond
from train_t2i.methods import METHODS
from train_t2i.methods.base import Batch
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


def measured_tick(settings: Settings) -> dict[str, int]:
    """Peak bytes of the rollout, of each role's update and of the sample images, on real tensors."""
    run, dtype = settings.run, DTYPES[settings.run.mixed_precision]
    settings = build.resolved(replace(settings, run=run))
    family, kind = build.build_family(settings.run, dtype), METHODS[run.method]
    low = dtype != torch.float32
    networks = build.assemble(
        settings, family, uses=kind.uses, trains=kind.trains, dtype=dtype, place=lambda net, blocks: None,
        autocast=(lambda: torch.autocast("cpu", dtype=dtype)) if low else nullcontext,
    )  # fmt: skip
    device = torch.device("cpu")
    terms = reward_terms.build_terms(settings.method, dtype, device, run.gradient_checkpointing, run.seed)
    method = build.build_method(settings, networks, device, terms)
    shape, clock = build.latent_shape(family, settings.size_px), last_tick(settings)
    rows = range(run.batch_size)
    latents = torch.randn(run.batch_size, *shape)
    images = torch.rand(run.batch_size, 3, *settings.size_px)
    batch = Batch(rows, ["a red circle " * 4] * run.batch_size, rows, images, latents, latents)
    told = full_texts(settings, dtype)
    family.encode = lambda prompts, negative=None, sources=(): told[negative is None]  # type: ignore[method-assign]
    rollout = method.rollout(batch, clock)
    for term in terms:
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
        found["sheet"] = peak_bytes(lambda: family.decode(torch.randn(run.batch_size_test, *shape)))
    return found
