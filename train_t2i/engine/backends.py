"""What differs between backends, and the two whose optimizers are ours to step: replicated and FSDP2.

Whatever the backend, a process updates plain tensors: whole parameters, or its share of each.  ``pieces`` says which
elements of which parameter they are; checkpoints are put together and taken apart from that alone (state.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train_t2i.engine.adam import AdamSettings, make_adam
from train_t2i.engine.asked import check_blocks
from train_t2i.engine.offload import Offloaded, is_apart
from train_t2i.engine.state import Piece


class Backend(Protocol):
    """One optimizer a trained role.  Every call is made by all processes, in the same order."""

    sharded: bool  # whether a network call needs all processes
    optimizers: dict[str, torch.optim.Optimizer]
    named: dict[str, dict[str, nn.Parameter]]
    offloaded: dict[str, Offloaded]  # the optimizers whose state waits on the host

    def place(self, net: nn.Module, blocks: Sequence[str]) -> None:
        """Put a network on the device; ``blocks`` are the class names of its repeated blocks."""
        ...

    def prepare(self, role: str, net: nn.Module, named: dict[str, nn.Parameter], adam: AdamSettings) -> nn.Module:
        """Make the role's optimizer; the module to call where a graph is built."""
        ...

    def backward(self, role: str, loss: Tensor, scale: float, last: bool) -> None:
        """Accumulate the gradients of ``scale * loss``; ``last`` before the update."""
        ...

    def gradient_norm(self, role: str, scale: float) -> Tensor:
        """Average the gradients over processes, take ``scale`` out of them; () their norm, not finite if one is not."""
        ...

    def skips_on_device(self, role: str) -> bool:
        """Whether ``update`` takes a ``skipped``."""
        ...

    def update(self, role: str, norm: Tensor, max_norm: float, skipped: Tensor | None = None) -> None:
        """Clip to ``max_norm`` (0: never), step, and drop the gradients; only the last where () ``skipped`` is 1."""
        ...

    def skip(self, role: str) -> None:
        """Drop the gradients."""
        ...

    def pieces(self, role: str) -> list[Piece]:
        """What this process keeps of the role's parameters and writes into a checkpoint."""
        ...

    def refresh(self, role: str) -> None:
        """Make the network see what was put into the pieces."""
        ...


class _Plain:
    """Optimizers on tensors of this process, with their gradients in ``.grad``."""

    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world = device, world
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.named: dict[str, dict[str, nn.Parameter]] = {}
        self.offloaded: dict[str, Offloaded] = {}
        self.tensors: dict[str, list[nn.Parameter]] = {}

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor of this process behind a parameter."""
        return parameter

    def collect(self, role: str) -> None:
        """Bring the averaged gradients into the ``.grad`` of this process's tensors."""
        raise NotImplementedError

    def prepare(self, role: str, net: nn.Module, named: dict[str, nn.Parameter], adam: AdamSettings) -> nn.Module:
        self.named[role] = named
        self.tensors[role] = [self.own(parameter) for parameter in named.values()]
        self.optimizers[role] = make_adam(dict(zip(named, self.tensors[role], strict=True)), adam)
        if adam.offload and is_apart(self.device):
            self.offloaded[role] = Offloaded(self.optimizers[role], self.device)
        return net

    def backward(self, role: str, loss: Tensor, scale: float, last: bool) -> None:
        (loss * scale if scale != 1 else loss).backward()

    def gradient_norm(self, role: str, scale: float) -> Tensor:
        self.collect(role)
        gradients = [tensor.grad for tensor in self.tensors[role] if tensor.grad is not None]
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        return self.norm(gradients)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def skips_on_device(self, role: str) -> bool:
        return isinstance(self.optimizers[role], torch.optim.AdamW)  # fused: see make_adam

    def update(self, role: str, norm: Tensor, max_norm: float, skipped: Tensor | None = None) -> None:
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.tensors[role], max_norm, norm)
        optimizer: Any = self.optimizers[role]
        optimizer.found_inf = skipped  # how torch.amp.GradScaler tells a fused optimizer: it reads it on the device
        (self.offloaded.get(role) or optimizer).step()
        self.skip(role)

    def skip(self, role: str) -> None:
        for parameter in (*self.named[role].values(), *self.tensors[role]):
            parameter.grad = None

    def refresh(self, role: str) -> None:
        """The pieces are the network's own memory."""


class Replicated(_Plain):
    """Data parallelism: every process has everything; gradients are averaged as one flat vector, exact in any layout."""

    sharded = False

    def place(self, net: nn.Module, blocks: Sequence[str]) -> None:
        net.to(self.device)

    def collect(self, role: str) -> None:
        parameters = self.tensors[role]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.world == 1:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            return
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, gradient in zip(parameters, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            parameter.grad = gradient

    def pieces(self, role: str) -> list[Piece]:
        return [
            Piece(name, tuple(p.shape), 0, p.numel(), tensor, 0)
            for (name, p), tensor in zip(self.named[role].items(), self.tensors[role], strict=True)
        ]


class FSDP2(_Plain):
    """torch's ``fully_shard``: parameters, gradients and optimizer state of a block lie in rows on all processes.

    The optimizers work on the processes' own rows as plain tensors, so that any optimizer does, 8-bit ones included.
    """

    sharded = True

    def __init__(self, device: torch.device, world: int, dtype: torch.dtype, named: Sequence[str] = ()) -> None:
        """``named``: blocks that the launcher names, which the networks must have."""
        super().__init__(device, world)
        self.blocks_named = tuple(named)
        self.mesh = init_device_mesh(device.type, (world,))
        low = None if dtype == torch.float32 else dtype
        # Times and latents stay fp32 on their way in; autocast is around the call
        self.precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.roots: list[FSDPModule] = []

    def place(self, net: nn.Module, blocks: Sequence[str]) -> None:
        check_blocks(self.blocks_named, blocks)
        for module in _innermost_first(net, blocks):
            fully_shard(module, mesh=self.mesh, mp_policy=self.precision)
        fully_shard(net, mesh=self.mesh, mp_policy=self.precision)
        assert isinstance(net, FSDPModule)
        self.roots.append(net)

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        whole: Any = parameter.detach()  # a DTensor
        return nn.Parameter(whole.to_local())

    def refresh(self, role: str) -> None:
        """A call without a graph leaves a root's rows gathered: the next must see what has changed."""
        for net in self.roots:
            net.reshard()

    def collect(self, role: str) -> None:
        self.refresh(role)
        for parameter, own in zip(self.named[role].values(), self.tensors[role], strict=True):
            gradient: Any = parameter.grad  # a DTensor
            own.grad = torch.zeros_like(own) if gradient is None else gradient.to_local()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        square = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square)
        return square.sqrt()

    def pieces(self, role: str) -> list[Piece]:
        found = []
        for (name, parameter), own in zip(self.named[role].items(), self.tensors[role], strict=True):
            assert isinstance(parameter, DTensor)
            shape = tuple(parameter.shape)
            _, offset = compute_local_shape_and_global_offset(shape, self.mesh, parameter.placements)
            start = offset[0] * (parameter.numel() // shape[0]) if own.numel() else 0
            found.append(Piece(name, shape, start, own.numel(), own, 0))
        return found


def _innermost_first(net: nn.Module, blocks: Sequence[str]) -> Iterable[nn.Module]:
    return reversed([module for module in net.modules() if type(module).__name__ in blocks])
