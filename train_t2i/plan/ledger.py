"""Memory that a computation would take, counted on tensors that have shapes and no content.

The computation runs on torch's meta device, forward and backward, through the very code that trains.  Two things there
are not what they are on a GPU, and are put right while ``like_a_gpu`` lasts: autocast does not touch meta tensors, and
attention falls back to an implementation that keeps a matrix of all pairs of tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from train_t2i.plan.work import add_attention

# What autocast does on CUDA (torch/csrc/autograd, "CUDA Ops that can autocast to ..."), of what networks call here
IN_LOW_PRECISION = (
    *((F, name) for name in ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "scaled_dot_product_attention")),
    *((torch, name) for name in ("matmul", "bmm", "baddbmm", "addmm", "mm")),
    *((Tensor, name) for name in ("matmul", "__matmul__", "bmm")),
)  # fmt: skip
IN_FP32 = (
    *((F, name) for name in ("layer_norm", "group_norm", "softmax", "mse_loss", "normalize")),
    *((torch, name) for name in ("softmax", "rsqrt", "exp", "sum", "cumsum")),
    *((Tensor, name) for name in ("softmax", "rsqrt", "exp", "sum", "cumsum", "pow", "__pow__")),
)  # fmt: skip


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once, and what of them are gradients of parameters."""

    total: int = 0
    gradients: int = 0

    @property
    def activations(self) -> int:
        return self.total - self.gradients


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside and is still alive.

    Gradients of ``parameters`` count ``gradient_share`` of their bytes: what a process keeps where they are scattered.
    ``held``: they are there from the start, as after a first micro-batch.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter] = (), gradient_share: float = 1.0, *, held: bool = False
    ) -> None:
        super().__init__()
        self.live_bytes, self.gradient_bytes, self.peak = 0, 0, Peak()
        self._bytes: dict[int, tuple[int, bool]] = {}  # storage -> its bytes, whether it is a gradient
        self._share, self._held = gradient_share, list(parameters) if held else []
        self._hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in parameters]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((*args, *(kwargs or {}).values()))}
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_in((made,)):
            if tensor.untyped_storage()._cdata not in given:  # else a view
                self._count(tensor.untyped_storage())
        return made

    def __enter__(self) -> Ledger:
        super().__enter__()
        for parameter in self._held:
            parameter.grad = torch.zeros_like(parameter)
            self._is_gradient(parameter)
        self.peak = Peak(self.live_bytes, self.gradient_bytes)
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes(), False
        self.live_bytes += storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        if self.live_bytes > self.peak.total:
            self.peak = Peak(self.live_bytes, self.gradient_bytes)

    def _drop(self, key: int) -> None:
        size, is_gradient = self._bytes.pop(key)
        self.live_bytes -= size
        self.gradient_bytes -= size if is_gradient else 0

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, known = self._bytes.get(key, (0, True))
        if known:
            return
        kept = int(size * self._share)
        self._bytes[key] = kept, True
        self.live_bytes += kept - size
        self.gradient_bytes += kept


class Flash(torch.autograd.Function):
    """Attention that keeps its inputs, its output and one fp32 number a query, as the fused kernels do.

    Source: FlashAttention (arXiv 2205.14135), algorithm 1.  Shapes only: nothing is computed.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        add_attention(query, key, value)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        add_attention(query, key, value, ctx.needs_input_grad)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``F.scaled_dot_product_attention`` by shapes; meta tensors alone go that way."""
    rows = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query, key, value = (t.expand(*rows, *t.shape[-2:]) for t in (query, key, value))
    return Flash.apply(query, key, value)


class Elsewhere:
    """Tensors that are kept for backward take no memory of the device until they are asked for; ``bytes`` went so far."""

    def __init__(self) -> None:
        self.bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        def pack(tensor: Tensor) -> tuple[Any, ...]:
            self.bytes += tensor.nbytes
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(told: tuple[Any, ...]) -> Tensor:
            return torch.empty_strided(*told[:2], dtype=told[2], device="meta")

        return saved_tensors_hooks(pack, unpack)


class _Casts:
    """Autocast of the CPU says when; the tables above say what.  A parameter's copy is kept until a network call ends."""

    def __init__(self) -> None:
        self.copies: dict[int, Tensor] | None = None

    @contextmanager
    def network_call(self, dtype: torch.dtype) -> Iterator[None]:
        before, self.copies = self.copies, {}
        try:
            with _AUTOCAST("cpu", dtype=dtype):
                yield
        finally:
            self.copies = before

    def lower(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float32):
            return value
        dtype = torch.get_autocast_dtype("cpu")
        if self.copies is None or not (value.requires_grad and value.is_leaf):
            return value.to(dtype)
        return self.copies.setdefault(id(value), value.to(dtype))

    @staticmethod
    def widen(value: Any) -> Any:
        low = isinstance(value, Tensor) and value.is_meta and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if low else value


def _converting(function: Callable[..., Any], convert: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with _AUTOCAST("cpu", enabled=False):  # what it calls in turn gets what it is given
            return function(*(convert(a) for a in args), **{key: convert(a) for key, a in kwargs.items()})

    return call


def _on_meta(fused: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if query.is_meta else function)(query, *args, **kwargs)

    return call


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return _AUTOCAST("cpu" if device_type == "meta" else device_type, *args, **kwargs)


_AUTOCAST = torch.autocast


@contextmanager
def like_a_gpu() -> Iterator[Callable[[torch.dtype], Any]]:
    """Meta tensors are cast and attended to as a GPU does it; yields what stands for autocast around a network call."""
    casts = _Casts()
    with ExitStack() as stack:
        fused = _on_meta(_attention, F.scaled_dot_product_attention)
        stack.enter_context(replaced(F, "scaled_dot_product_attention", fused))
        stack.enter_context(replaced(torch, "autocast", _autocast))
        for convert, table in ((casts.lower, IN_LOW_PRECISION), (casts.widen, IN_FP32)):
            for owner, name in table:
                stack.enter_context(replaced(owner, name, _converting(getattr(owner, name), convert)))
        yield casts.network_call
