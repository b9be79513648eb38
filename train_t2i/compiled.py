"""Compiled blocks (``--compile blocks``): torch.compile of what a network repeats, in place.

Blocks of one shape share their code: a network of seventy blocks compiles one, once for each way in which the roles call
it (which adapter, with or without a graph).  What differs from call to call is an input of that code: the rows, which are
dimension 0 of every tensor, and the adapter's scale, since torch takes a module's floats for inputs (tests count the code).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from train_t2i.errors import UserError

FIRST = "2.15"  # the first release that it is tested with
# Most compiled versions of one block: torch's own limit of 8 is less than roles times sizes.  Kinds of blocks of one class
# count apart.  (torch's types do not know these two arguments yet.)
LIMITS: dict[str, Any] = {"recompile_limit": 32, "isolate_recompiles": True}


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch is too old for this, or has nothing to make code with."""
    if torch.__version__ < FIRST:
        raise UserError(f"--compile blocks needs torch {FIRST}, this is {torch.__version__}", "update, or leave it out")
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "--compile blocks needs Triton, which is not there or does not know this GPU", "leave it out"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("--compile blocks needs a C++ compiler", "install g++, or leave it out") from None


def compile_blocks(nets: Iterable[nn.Module], block_names: Sequence[str], backend: str) -> None:
    """Compile the repeated blocks of ``nets``.

    ``forward`` alone is compiled: hooks around a block (sharding, checkpointing), names of parameters and copies of the
    network are what they were.
    """
    kinds: dict[Any, list[nn.Module]] = defaultdict(list)
    for net in nets:
        for module in net.modules():
            if type(module).__name__ in block_names:
                kinds[_kind(module)].append(module)
    for blocks in kinds.values():
        forward = _compiled(type(blocks[0]).forward, backend)
        for block in blocks:
            block.forward = MethodType(forward, block)


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """An unbound ``forward`` whose number of rows is not part of its code."""
    fast = torch.compile(forward, backend=backend, **LIMITS)

    def call(block: nn.Module, *arguments: Any, **named: Any) -> Any:
        for value in (*arguments, *named.values()):
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return fast(block, *arguments, **named)

    return call


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What decides a block's code."""
    return type(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
