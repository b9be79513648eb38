"""``--gradient-checkpointing auto``: the fastest of its ways with which the run is planned to fit on its device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from train_t2i.acting_flags import sees_images
from train_t2i.config import EDIT_FAMILIES, Settings
from train_t2i.errors import UserError
from train_t2i.plan import rehearsed
from train_t2i.plan.estimate import GB, Plan, estimate
from train_t2i.plan.model import published_of

FLAG = "--gradient-checkpointing auto"
Way = bool | str  # a value of the flag
IMAGES = "decoder+rewards"


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU, whose memory is not the run's alone."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def choose(settings: Settings, backend: str, world: int, memory_bytes: int | None) -> tuple[Way, str]:
    """(what the flag stands for on one of ``world`` devices, a line that says why).

    The plan's reserve is part of what must fit.  Where nothing can be planned it is on, which is safe to start with.
    """
    if memory_bytes is None:
        return True, f"{FLAG}: on (the memory of a CPU is not the run's alone)"
    planned: dict[Way, Plan] = {}
    try:
        for way in ways(settings):
            if way == IMAGES and not others_fit(planned[False], memory_bytes):
                continue
            planned[way] = plan_of(settings, backend, world, way)
            if planned[way].total <= memory_bytes:
                break
    except UserError as error:
        return True, f"{FLAG}: on (not planned: {error})"
    chosen = next(reversed(planned))
    sums = ", ".join(f"{plan.total / GB:.1f} GB {spelled(way)}" for way, plan in planned.items())
    verdict = spelled(chosen) + (", and still too much" if planned[chosen].total > memory_bytes else "")
    return chosen, f"{FLAG}: {verdict} (planned {sums}; the device has {memory_bytes / GB:.1f})"


def ways(settings: Settings) -> list[Way]:
    """From the fastest to the one that needs least.  Decoder and rewards are a hundredth of what networks compute."""
    return [False, *([IMAGES] if sees_images(SimpleNamespace(**settings.as_dict())) else []), True, "host"]


def others_fit(plan: Plan, memory_bytes: int) -> bool:
    """Whether all phases but the worst do, which may be the one that sees images."""
    rest = [sum(parts) for name, parts in plan.phases.items() if name != plan.worst]
    return plan.total - sum(plan.phases[plan.worst]) + max(rest, default=0) <= memory_bytes


def spelled(way: Way) -> str:
    return way if isinstance(way, str) else ("on" if way else "off")


def plan_of(settings: Settings, backend: str, world: int, way: Way) -> Plan:
    """Raises UserError where the sizes of the model are not known here."""
    run = replace(settings.run, gradient_checkpointing=way, backend=backend)
    _, published = published_of(run, None)
    published = replace(published, num_sources=EDIT_FAMILIES.get(published.family, published.num_sources))
    found = rehearsed(replace(settings, run=run), published, world)
    return estimate(run, found, world)
