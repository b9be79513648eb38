"""FLOPs of a tick, counted operator by operator while it is rehearsed; a multiply-add is two.

torch's own formulae (``torch.utils.flop_counter``) on the shapes of each product, convolution and attention, forward and
backward, so what is not computed is not counted: no weight gradients of a frozen base, none before the first trained layer.
Attention is its two products forward and four backward; a fused kernel makes one of them again, which is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from train_t2i.families.base import Cond

# Fused kernels, whose backward pass makes the scores again
ATTENTION_BACKWARD = [op for op in flop_registry if str(op).endswith("attention_backward") or "cpu_backward" in str(op)]


@dataclass(frozen=True)
class Call:
    """A network call: of which module ("" for a wrapper around one), whether it builds a graph, and its rows.

    A guided call has both halves' rows.
    """

    module: str
    builds_graph: bool
    rows: int


@dataclass(frozen=True)
class Work:
    """What a phase computes."""

    network: int = 0  # FLOPs of network calls, forward and backward
    rest: int = 0  # FLOPs of decoders and rewards, forward and backward
    again: int = 0  # FLOPs that checkpointing makes a second time
    calls: tuple[Call, ...] = ()

    @property
    def rows(self) -> int:
        return sum(call.rows for call in self.calls)


class Counter(TorchDispatchMode):
    """Counts until ``take``.  A network call is one of ``family.call``, with the backward pass of what it returned."""

    def __init__(self, family: Any, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self._family, self._names = family, {id(net): name for name, net in modules.items()}
        self._stack = ExitStack()
        self._depth = 0  # of modules whose forward runs
        self._calling = self._reached = False  # inside a network call; in backward, past the end of one
        self._clear()

    def _clear(self) -> None:
        self._network = self._rest = self._again = 0
        self._calls: list[Call] = []

    def take(self) -> Work:
        """What was counted since the last time."""
        made = Work(self._network, self._rest, self._again, tuple(self._calls))
        self._clear()
        return made

    def add(self, flops: int) -> None:
        backward = in_backward()
        self._reached &= backward
        if backward and self._depth:
            self._again += flops
        elif self._calling or self._reached:
            self._network += flops
        else:
            self._rest += flops

    def __enter__(self) -> Counter:
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),  # recomputation ends by an exception
        ):
            self._stack.callback(handle.remove)
        self._stack.enter_context(self._watching())
        COUNTERS.append(self)
        self._stack.callback(COUNTERS.remove, self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if func._overloadpacket in ATTENTION_BACKWARD:  # (gradient, queries, keys, values, ...)
            self.add(2 * sdpa_flop_count(*(tensor.shape for tensor in args[1:4])))
        elif formula is not None:
            self.add(formula(*args, **(kwargs or {}), out_val=made))
        return made

    def _enter_module(self, *_: Any) -> None:
        self._depth += 1

    def _leave_module(self, *_: Any) -> None:
        self._depth -= 1

    @contextmanager
    def _watching(self) -> Iterator[None]:
        call = self._family.call

        def watched(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            before, self._calling = self._calling, True
            try:
                out = call(net, x_t, t, cond)
            finally:
                self._calling = before
            if not in_backward():
                self._calls.append(Call(self._names.get(id(net), ""), out.requires_grad, len(x_t)))
            if out.requires_grad:
                out.register_hook(self._reach)
            return out

        self._family.call = watched
        try:
            yield
        finally:
            self._family.call = call

    def _reach(self, gradient: Tensor) -> None:
        self._reached = True


COUNTERS: list[Counter] = []  # those that count now


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def add_attention(query: Tensor, key: Tensor, value: Tensor, needed: Sequence[bool] | None = None) -> None:
    """Tell the counters of attention that is not made of operators: (..., L, D), (..., S, D), (..., S, E).

    Forward: the scores and their sum over values.  Backward, for the gradients that are ``needed``: of the scores from the
    output's, of values, of queries, of keys.
    """
    rows = query.numel() // query.shape[-1] * key.shape[-2]
    scores, sums = 2 * rows * query.shape[-1], 2 * rows * value.shape[-1]
    if needed is None:
        flops = scores + sums
    else:
        of_query, of_key, of_value = needed
        flops = scores * (of_query + of_key) + sums * (of_value + (of_query or of_key))
    for counter in COUNTERS:
        counter.add(flops)
