"""Frozen linear layers in 8 or 4 bits (``--base-quant``): codes that are turned back into weights for each product.

Only weights are rounded, never activations: a layer computes exactly what a plain layer with the rounded weights does,
and the gradient that passes through it to the LoRA factors is exactly that layer's.  Schemes that round activations too
(LLM.int8, arXiv 2208.07339) do not have that, and are not offered.  Nothing is kept for backward.

Storage, bytes a weight: nf4 (QLoRA, arXiv 2305.14314, section 3) 0.5 and a scale of 4 bytes for each 64 weights; fp8 (e4m3)
and int8 1 and a scale for each 256.  Codes and tables are those of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_t2i.errors import UserError

BLOCK = {"nf4": 64, "fp8": 256, "int8": 256}  # weights that share a scale
CODE_BYTES = {"nf4": 0.5, "fp8": 1.0, "int8": 1.0}
SCALE_BYTES = 4


def library() -> Any:
    """bitsandbytes' functions.  Raises UserError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError("--base-quant needs bitsandbytes", "uv sync --extra bitsandbytes") from None
    return bitsandbytes.functional


def table(kind: str) -> Tensor:
    """(256,) fp32: what the codes of an 8-bit kind stand for, in [-1, 1]."""
    functions = library()
    with torch.device("cpu"):  # its numbers are read while it is made: on the meta device there are none
        made = functions.create_fp8_map(True, 4, 3, 8) if kind == "fp8" else functions.create_linear_map(True, 8)
    return made.float()


def _near(weight: Tensor) -> Tensor:
    """On the accelerator where there is one: a CPU rounds some million weights a second."""
    if weight.is_meta or not torch.accelerator.is_available():
        return weight
    return weight.to(torch.accelerator.current_accelerator())


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as codes, (N, 1) or (out, in) uint8, and one scale a block.

    It is an ``nn.Linear`` so that peft puts its LoRA beside it; ``in_features`` and ``out_features`` say its true shape.
    """

    scales: Tensor
    codebook: Tensor

    def __init__(self, plain: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = plain.in_features, plain.out_features, kind
        functions, weight = library(), _near(plain.weight.detach())
        if kind == "nf4":
            codes, state = functions.quantize_4bit(weight, blocksize=BLOCK[kind], quant_type=kind)
            codebook = state.code
        else:
            codebook = table(kind).to(weight.device)
            codes, state = functions.quantize_blockwise(weight.float(), code=codebook, blocksize=BLOCK[kind])
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach(), requires_grad=False)
        self.register_buffer("scales", state.absmax.float(), persistent=False)
        self.register_buffer("codebook", codebook, persistent=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(out, in): the weight that the codes stand for."""
        shape = (self.out_features, self.in_features)
        return _dense(self.weight, self.scales, self.codebook, self.kind, shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's format where it is on."""
        device = "cpu" if x.is_meta else x.device.type  # meta tensors have no autocast of their own
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Product.apply(x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


def _dense(
    codes: Tensor, scales: Tensor, codebook: Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    functions = library()
    state = functions.QuantState(
        absmax=scales, shape=torch.Size(shape), code=codebook, blocksize=BLOCK[kind], quant_type=kind, dtype=dtype
    )
    return functions.dequantize_4bit(codes, state) if kind == "nf4" else functions.dequantize_blockwise(codes, state)


class _Product(torch.autograd.Function):
    """x W' + b, whose backward makes W anew: g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if torch.compiler.is_compiling():
            product = _whole(x, layer, backward=False)
            return product if bias is None else product + bias
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.compiler.is_compiling():
            return _whole(gradient, ctx.layer, backward=True), None
        return gradient @ ctx.layer.dense(gradient.dtype), None


def _whole(x: Tensor, layer: QuantizedLinear, *, backward: bool) -> Tensor:
    shape = [layer.out_features, layer.in_features]
    return _times_codes(x, layer.weight, layer.scales, layer.codebook, layer.kind, shape, backward)


@torch.library.custom_op("train_t2i::times_codes", mutates_args=())
def _times_codes(
    x: Tensor, codes: Tensor, scales: Tensor, codebook: Tensor, kind: str, shape: list[int], backward: bool
) -> Tensor:
    """x W', or g W, as one operation: a compiler that saw W made twice would keep the first for the second."""
    weight = _dense(codes, scales, codebook, kind, shape, x.dtype)
    return x @ (weight if backward else weight.mT)


@_times_codes.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, codebook: Tensor, kind: str, shape: list[int], backward: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[1 if backward else 0]))


def quantized_layers(net: nn.Module, block_names: Sequence[str]) -> list[str]:
    """Names of the linear layers inside the repeated blocks.

    What lies outside (embeddings, the last projection), norms and convolutions stay as they are.
    """
    blocks = [f"{name}." for name, module in net.named_modules() if type(module).__name__ in block_names]
    linear = [name for name, module in net.named_modules() if type(module) is nn.Linear]
    return [name for name in linear if name.startswith(tuple(blocks))]


def quantize_blocks(net: nn.Module, block_names: Sequence[str], kind: str) -> None:
    """Put codes in place of the linear layers inside the repeated blocks of a frozen network without adapters."""
    for name in quantized_layers(net, block_names):
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, QuantizedLinear(net.get_submodule(name), kind))  # type: ignore[arg-type]
