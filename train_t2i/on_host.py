"""``--gradient-checkpointing host``: what a network call keeps for backward waits in the host's memory.

The way there and back is torch's own (``save_on_cpu``); what stays on the device is said here.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

SMALL_BYTES = 1 << 20  # below, a copy costs more than the room that it makes is worth


def to_host() -> saved_tensors_hooks:
    """Pinned where there is a GPU, and copied in the order of its stream: nothing waits."""
    return save_on_cpu(pin_memory=True)


class KeptOnHost(saved_tensors_hooks):
    """Inside, what autograd keeps goes to the host, but for small tensors and the weights of ``net``, which stay anyway.

    Weights that a backend gathers for a call are kept like activations.
    """

    def __init__(self, net: nn.Module) -> None:
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        host = to_host()

        def pack(tensor: Tensor) -> tuple[bool, object]:
            goes = tensor.nbytes >= SMALL_BYTES and tensor.untyped_storage()._cdata not in weights
            return goes, host.pack_hook(tensor) if goes else tensor

        def unpack(packed: tuple[bool, object]) -> Tensor:
            went, kept = packed
            return host.unpack_hook(kept) if went else kept  # type: ignore[return-value]

        super().__init__(pack, unpack)
