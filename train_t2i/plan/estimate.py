"""Bytes on each device: what a rehearsal counted, shared out as a backend does (docs/distributed.md, docs/memory.md).

W processes, T trained elements of a role, P elements of a network.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from train_t2i.base_quant import BLOCK, CODE_BYTES, SCALE_BYTES
from train_t2i.config import EDIT_FAMILIES, LAYOUTS, Config, resolved_layout
from train_t2i.engine import DTYPES
from train_t2i.engine.offload import SLICE
from train_t2i.networks import Role
from train_t2i.plan.rehearsal import ModuleBytes, Rehearsal

GB = 10**9
CARDS_GB = (24, 48, 80, 141)  # the least of the common cards of each size holds as many GB of 10^9 bytes
FP32_BYTES = 4
STEP = " step"  # end of the name of a phase in which moments come to the gradients
ADAM_BYTES = 8  # two moments in fp32
ADAM_8BIT_BYTES = 2 + 2 * FP32_BYTES / 256  # and a scale for each block of 256
# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters
BUCKET, LIVE = 500_000_000, 1_000_000_000

# Not counted but assumed, and said so: nothing here could be measured without a GPU.
CONTEXT_BYTES = int(1.5 * GB)  # CUDA context, kernels, cuBLAS and cuDNN workspaces
NETWORK_BYTES = 1 * GB  # NCCL's buffers, with more than one process
FRAGMENTATION = 0.05  # of what comes and goes


@dataclass(frozen=True)
class Plan:
    """Bytes a device, by what they are; ``phases`` are the most that comes and goes, one after the other."""

    frozen: int  # networks that are not trained
    trained: int  # fp32 masters
    optimizer: int  # moments, and the moving average where there is one
    encoders: int
    vae: int
    rewards: int
    gathered: int  # what sharding and its messages hold at once
    phases: dict[str, tuple[int, int]]  # name -> (gradients, activations)
    reserve: int
    host: dict[str, int] = field(default_factory=dict)  # of the host's memory, pinned, by what it is for

    @property
    def kept(self) -> int:
        """From the start of the run to its end."""
        return self.frozen + self.trained + self.optimizer + self.encoders + self.vae + self.rewards

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name]))

    @property
    def total(self) -> int:
        return self.kept + self.gathered + sum(self.phases[self.worst]) + self.reserve

    @property
    def cards(self) -> tuple[int, ...]:
        """Sizes in GB that hold it."""
        return tuple(card for card in CARDS_GB if self.total <= card * GB)


def estimate(run: Config, found: Rehearsal, world: int) -> Plan:
    """What each of ``world`` processes keeps.  ``found`` was rehearsed with ``gradient_share`` and ``is_gathered``."""
    share = 1 / world if is_sharded(run, world) else 1.0
    scattered = 1 / world if world > 1 and run.backend != "ddp" else 1.0
    total_trained = sum(found.trained.values())
    moments = int((adam_bytes(run) * total_trained + FP32_BYTES * found.averaged) * scattered)
    masters = FP32_BYTES * total_trained * share
    if run.backend == "zero2" and world > 1:  # whole weights, and this process's part once more
        masters += FP32_BYTES * total_trained / world
    phases = phases_of(run, found, world)
    coming = max(sum(phase) for phase in phases.values())
    return Plan(
        frozen=int(sum(module.frozen_bytes for module in found.modules.values()) * share),
        trained=int(masters),
        optimizer=0 if run.offload_optimizer else moments,
        encoders=0 if run.prompt_cache else found.encoder_bytes,
        vae=found.vae_bytes,
        rewards=found.reward_bytes,
        gathered=gathered_bytes(run, found, world),
        phases=phases,
        reserve=CONTEXT_BYTES + (NETWORK_BYTES if world > 1 else 0) + int(FRAGMENTATION * coming),
        host=waiting_bytes(run, found, moments),
    )


def waiting_bytes(run: Config, found: Rehearsal, moments: int) -> dict[str, int]:
    """In the host's memory, by what it is; nothing that is not there."""
    waits = {"optimizer": moments if run.offload_optimizer else 0, "activations": found.waiting_bytes}
    return {name: size for name, size in waits.items() if size}


def adam_bytes(run: Config) -> float:
    """Of a trained element's two moments."""
    return ADAM_8BIT_BYTES if run.use_8bit_adam else ADAM_BYTES


def gradient_share(run: Config, world: int) -> float:
    """Of a role's gradients, what stays on a process once they are averaged."""
    return 1.0 if run.backend == "ddp" else 1 / world


def is_gathered(run: Config, world: int) -> bool:
    """Whether network calls see weights that were gathered in their own format."""
    return run.backend == "fsdp2" and world > 1


def is_sharded(run: Config, world: int) -> bool:
    """Whether a network call needs all processes."""
    return run.backend in ("fsdp2", "zero3") and world > 1


def phases_of(run: Config, found: Rehearsal, world: int) -> dict[str, tuple[int, int]]:
    phases = {"rollout": found.rollout, "sample images": found.sheet}
    phases |= {f"{role} update": peak for role, peak in found.updates.items()}
    split = {name: (peak.gradients, peak.activations) for name, peak in phases.items()}
    if run.backend == "ddp" and world > 1:  # one flat copy of all gradients is averaged
        for role in found.updates:
            split[f"{role} gradient exchange"] = (2 * FP32_BYTES * found.trained[role], 0)
    if run.offload_optimizer:  # the moments of a slice at a time come to the gradients
        for role in found.updates:
            mine = found.trained[role] * gradient_share(run, world)
            split[role + STEP] = (int(FP32_BYTES * mine), int(adam_bytes(run) * min(mine, SLICE)))
    return split


def gathered_bytes(run: Config, found: Rehearsal, world: int) -> int:
    """FSDP2: the block that is at work, the next one, and what lies outside blocks.  DeepSpeed: its buckets."""
    if world == 1 or run.backend == "ddp":
        return 0
    if run.backend == "fsdp2":
        return max(map(_two_blocks, found.modules.values()))
    most_trained = max(found.trained.values())
    if run.backend == "zero2":  # two buckets, since messages overlap with backward
        return 2 * FP32_BYTES * BUCKET
    elements = max(module.num_elements for module in found.modules.values())
    return FP32_BYTES * min(BUCKET, most_trained) + FP32_BYTES * min(LIVE, elements)


def _two_blocks(module: ModuleBytes) -> int:
    return 2 * module.block_bytes + module.outside_bytes


# -- what to turn down -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lever:
    """A change of settings and the plan that it leads to, from the same rehearsal: its activations are scaled."""

    what: str
    plan: Plan


def levers(run: Config, found: Rehearsal, world: int) -> list[Lever]:
    """Changes that need no other rehearsal, those that cost least speed and quality first."""
    tried: list[tuple[str, Plan]] = []
    now = estimate(run, found, world)
    if not run.prompt_cache and run.model_family not in EDIT_FAMILIES:
        tried.append(("--prompt-cache (no text encoder is loaded)", replace(now, encoders=0)))
    if not run.use_8bit_adam:
        tried.append(("--use-8bit-adam", estimate(replace(run, use_8bit_adam=True), found, world)))
    if run.backend in ("ddp", "fsdp2"):
        waits = estimate(replace(run, offload_optimizer=True), found, world)
        tried.append((f"--offload-optimizer ({waits.host['optimizer'] / GB:.2f} GB of the host's memory)", waits))
    if run.batch_size > 1:
        low = 0 if run.mixed_precision == "no" or is_gathered(run, world) else DTYPES[run.mixed_precision].itemsize
        alone = estimate(
            replace(run, batch_size=1), smaller_batch(found, run.batch_size, low, gradient_share(run, world)), world
        )
        again = f"--batch-size 1 --gradient-accumulation-steps {run.batch_size * run.gradient_accumulation_steps}"
        tried.append((again, alone))
    if run.backend == "ddp" and world > 1 and run.base_quant == "none":  # codes are not shared out
        for backend in ("fsdp2",) if run.offload_optimizer else ("zero2", "fsdp2"):
            other = replace(run, backend=backend)
            tried.append((f"--backend {backend}", estimate(other, shared_out(found, world), world)))
    if run.lora_rank > 8 and now.trained:
        less = fewer_ranks(found, run)
        tried.append((f"--lora-rank {run.lora_rank // 2}", estimate(run, less, world)))
    if run.backend == "ddp" and run.base_quant == "none":
        tried += [(f"--base-quant {kind}", estimate(run, in_codes(found, run, kind), world)) for kind in ("fp8", "nf4")]
    return [Lever(what, plan) for what, plan in tried if plan.total < 0.98 * now.total]


def in_codes(found: Rehearsal, run: Config, kind: str) -> Rehearsal:
    """Frozen linear layers as codes and scales."""
    now, then = DTYPES[run.mixed_precision].itemsize, CODE_BYTES[kind] + SCALE_BYTES / BLOCK[kind]
    modules = {
        name: replace(m, frozen_bytes=int(m.frozen_bytes - m.num_quantizable * (now - then)))
        for name, m in found.modules.items()
    }
    return replace(found, modules=modules)


def fewer_ranks(found: Rehearsal, run: Config) -> Rehearsal:
    """Half the LoRA factors; what is trained in full stays."""
    routes = LAYOUTS[resolved_layout(run)]
    trained = {role: n // 2 if routes[role][1] is not None else n for role, n in found.trained.items()}
    return replace(found, trained=trained, averaged=trained["generator"] if found.averaged else 0)


def smaller_batch(found: Rehearsal, batch_size: int, copy_bytes: int, share: float) -> Rehearsal:
    """One row a micro-batch: activations go with the rows; gradients are then held from one to the next.

    Copies of trained weights in the format of the network calls do not go with them.
    """

    def one_row(role: Role) -> tuple[int, int]:
        activations = found.updates[role].activations
        copies = min(activations, copy_bytes * found.trained[role])
        return int(FP32_BYTES * found.trained[role] * share), copies + (activations - copies) // batch_size

    peaks = {role: replace(peak, total=sum(one_row(role)), gradients=one_row(role)[0])
             for role, peak in found.updates.items()}  # fmt: skip
    return replace(found, updates=peaks)


def shared_out(found: Rehearsal, world: int) -> Rehearsal:
    """Gradients scattered over ``world`` processes."""
    peaks = {
        role: replace(peak, total=peak.activations + peak.gradients // world, gradients=peak.gradients // world)
        for role, peak in found.updates.items()
    }
    return replace(found, updates=peaks)
