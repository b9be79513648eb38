"""``--gradient-checkpointing auto``: off where the run is planned to fit on its device without, else on."""

from __future__ import annotations

from dataclasses import replace

import torch

from train_t2i.config import EDIT_FAMILIES, Settings
from train_t2i.errors import UserError
from train_t2i.plan import rehearsed
from train_t2i.plan.estimate import GB, Plan, estimate
from train_t2i.plan.model import published_of

FLAG = "--gradient-checkpointing auto"


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU, whose memory is not the run's alone."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def choose(settings: Settings, backend: str, world: int, memory_bytes: int | None) -> tuple[bool, str]:
    """(whether to recompute activations, a line that says why), for one of ``world`` devices.

    The plan's reserve is part of what must fit.  Where nothing can be planned it is on, which never needs more.
    """
    if memory_bytes is None:
        return True, f"{FLAG}: on (the memory of a CPU is not the run's alone)"
    try:
        planned = {on: plan_of(settings, backend, world, on) for on in (False, True)}
    except UserError as error:
        return True, f"{FLAG}: on (not planned: {error})"
    on = planned[False].total > memory_bytes
    fits = planned[on].total <= memory_bytes
    sums = ", ".join(f"{planned[way].total / GB:.1f} GB {word}" for way, word in ((False, "without"), (True, "with")))
    verdict = f"{'on' if on else 'off'}" if fits else "on, and still too much"
    return on, f"{FLAG}: {verdict} (planned {sums}; the device has {memory_bytes / GB:.1f})"


def plan_of(settings: Settings, backend: str, world: int, on: bool) -> Plan:
    """Raises UserError where the sizes of the model are not known here."""
    run = replace(settings.run, gradient_checkpointing=on, backend=backend)
    _, published = published_of(run, None)
    published = replace(published, num_sources=EDIT_FAMILIES.get(published.family, published.num_sources))
    found = rehearsed(replace(settings, run=run), published, world)
    return estimate(run, found, world)
