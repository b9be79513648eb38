"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from train_t2i.config import Config
from train_t2i.plan.estimate import CARDS_GB, CONTEXT_BYTES, FRAGMENTATION, GB, NETWORK_BYTES, STEP, Lever, Plan
from train_t2i.plan.floor import CARDS, NAMED, Floor, least_seconds
from train_t2i.plan.rehearsal import Rehearsal

# What the seeds and their sources state, in GB a GPU; theirs, not ours, and not always at the same settings.
STATED = {
    "qwen_image": ("ArcFlow and pi-Flow: about 70 (DDP, LoRA rank 256, 4 images, checkpointing, 8-bit Adam, no text encoder)",),
    "flux_dev": ("ArcFlow: about 65, or 45 one image at a time (DDP, LoRA rank 256, 4 images, checkpointing, 8-bit Adam)",),
    "sdxl": ("DMDR: trained on GPUs of 144 (ZeRO-2, batch 8, no checkpointing, 8-bit Adam)",),
    "sd3_medium": ("DMDR: trained on GPUs of 144 (ZeRO-2, batch 8 at 512 px, no checkpointing, 8-bit Adam)",),
    "sd35_large": ("DMDR: trained on GPUs of 144 (ZeRO-2, batch 4, no checkpointing, 8-bit Adam)",),
}  # fmt: skip


def gb(count: float) -> str:
    return f"{count / GB:8.2f}"


def page(name: str, run: Config, layout: str, world: int, found: Rehearsal, plan: Plan) -> list[str]:
    """The head, the table, the verdict, and the sources' own figure where there is one."""
    processes = f"{world} processes, {run.backend}" if world > 1 else "1 process"
    trained = ", ".join(f"{role} {count / 1e6:.1f} M" for role, count in found.trained.items())
    lines = [
        f"{name}: {run.method}, layout {layout}, {run.resolution} px, batch {run.batch_size}, {run.mixed_precision}, {processes}",
        f"trained parameters: {trained}",
        "GB (10^9 bytes) on each device:",
        *table(plan),
        *(f"{gb(size)}  of the host's memory, pinned: {name}" for name, size in plan.host.items()),
        verdict(plan),
    ]
    return lines + [f"stated elsewhere: {line}" for line in STATED.get(name, ())]


def table(plan: Plan) -> list[str]:
    rows = [
        ("frozen weights", plan.frozen), ("trained weights (fp32)", plan.trained), ("optimizer", plan.optimizer),
        ("text encoders", plan.encoders), ("VAE", plan.vae), ("reward towers", plan.rewards),
        ("gathered weights, buckets", plan.gathered),
    ]  # fmt: skip
    gradients, rest = plan.phases[plan.worst]
    what = "moments" if plan.worst.endswith(STEP) else "activations"
    rows += [(f"gradients, {plan.worst}", gradients), (f"{what}, {plan.worst}", rest)]
    told = f"reserve, an estimate ({CONTEXT_BYTES / GB:g} context, {NETWORK_BYTES / GB:g} NCCL, {FRAGMENTATION:.0%} fragments)"
    rows += [(told, plan.reserve), ("sum", plan.total)]
    others = [
        f"  {name}: {gb(sum(parts)).strip()}"
        for name, parts in plan.phases.items()
        if name != plan.worst and any(parts)
    ]
    shown = [f"{gb(count)}  {what}" for what, count in rows if count]
    return [*shown, *(["in place of the worst phase's gradients and activations:", *others] if others else [])]


def told_floor(run: Config, least: Floor) -> list[str]:
    """What a step must compute and move, and how long that takes at the rates that the cards' makers state."""
    phases = ", ".join(
        f"{name}{'' if name == 'rollout' else ' update'} {tera(n)}" for name, n in least.network.items() if n
    )
    lines = [
        "a step on each device computes at the least, in FLOPs of 10^12 (a multiply-add is two):",
        f"{tera(sum(least.network.values())):>8}  network calls: {phases}",
    ]
    if least.rest:
        lines.append(f"{tera(least.rest):>8}  decoder and rewards")
    if least.again:
        lines.append(f"{tera(least.again):>8}  more is computed a second time for --gradient-checkpointing")
    lines += [
        "and moves at the least, in GB of its own memory:",
        f"{gb(least.read)}  weights, read once by each call, forward and backward",
        f"{gb(least.updated)}  gradients, masters and moments of its updates",
    ]
    if least.bus:
        lines.append(
            f"and, for --offload-optimizer, {gb(least.bus).strip()} GB between the host's memory and its own (in no time below)"
        )
    if run.mixed_precision != "no":
        seconds = ", ".join(f"{name} {least_seconds(least, CARDS[name]):.3g}" for name in NAMED)
        lines.append(f"which takes, at the rates that NVIDIA states, no less than (s): {seconds}")
    return lines


def tera(flops: float) -> str:
    return f"{flops / 1e12:.4g}"


def verdict(plan: Plan) -> str:
    words = [f"{card} GB {'yes' if card in plan.cards else 'no'}" for card in CARDS_GB]
    return "fits on cards of: " + ", ".join(words)


def told_levers(plan: Plan, found: Sequence[Lever]) -> list[str]:
    if not found:
        return []
    lines = ["what to turn down, and what it comes to (activations scaled, not counted again):"]
    for lever in found:
        gained = [card for card in lever.plan.cards if card not in plan.cards]
        more = f"  now on {gained[0]} GB" if gained else ""
        lines.append(f"{gb(lever.plan.total)}  {lever.what}{more}")
    return lines
