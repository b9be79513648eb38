"""DeepSpeed ZeRO stages 2 and 3: one ``deepspeed.initialize`` a trained role, numbers in fp32 as on every backend.

DeepSpeed averages, clips and steps; the vote on finiteness comes before its step, which then does what all agreed on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train_t2i.engine.adam import AdamSettings, make_adam
from train_t2i.engine.offload import Offloaded
from train_t2i.engine.state import Piece
from train_t2i.errors import UserError

KEPT_WHOLE = 5_000  # elements: stage 3 leaves smaller tensors on every process, where gathering them costs more


class ZeRO:
    sharded: bool

    def __init__(
        self, device: torch.device, stage: int, max_grad_norm: float, more: Mapping[str, Any] | None = None
    ) -> None:
        """``more``: DeepSpeed's own settings from a user's file (asked.py)."""
        self.deepspeed = _deepspeed(device)
        self.device, self.stage, self.max_grad_norm = device, stage, max_grad_norm
        self.more: Mapping[str, Any] = more or {}
        self.sharded = stage == 3
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.engines: dict[str, Any] = {}
        self.named: dict[str, dict[str, nn.Parameter]] = {}
        self.offloaded: dict[str, Offloaded] = {}  # never: see config_checks

    def place(self, net: nn.Module, blocks: Sequence[str]) -> None:
        net.to(self.device)

    def prepare(self, role: str, net: nn.Module, named: dict[str, nn.Parameter], adam: AdamSettings) -> nn.Module:
        parameters = list(named.values())
        optimizer = make_adam(named, adam)
        engine, *_ = self.deepspeed.initialize(
            model=net, optimizer=optimizer, model_parameters=parameters, config=self._config()
        )
        self.engines[role], self.named[role] = engine, named
        self.optimizers[role] = engine.optimizer.optimizer
        return engine

    def _config(self) -> dict[str, Any]:
        """The user's settings over the defaults, below what the trainer itself decides."""
        on_gpu = self.device.type != "cpu"
        more = dict(self.more.get("zero_optimization", {}))
        zero = {"overlap_comm": on_gpu, "stage3_param_persistence_threshold": KEPT_WHOLE} | more
        return {
            "steps_per_print": None,
            **self.more,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero | {"stage": self.stage, "overlap_comm": on_gpu and zero["overlap_comm"]},
        }

    def backward(self, role: str, loss: Tensor, scale: float, last: bool) -> None:
        engine = self.engines[role]
        engine.set_gradient_accumulation_boundary(last)
        engine.optimizer.override_loss_scale(scale)
        engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self, role: str, scale: float) -> Tensor:
        zero = self.engines[role].optimizer
        if self.stage == 2:
            norm = zero.scaled_global_norm()
        else:
            norm = torch.linalg.vector_norm(torch.stack([torch.as_tensor(n) for n in zero._get_norm_groups()]))
        norm = torch.as_tensor(norm, device=self.device).float()
        return torch.where(norm < 0, torch.nan, norm) / scale  # DeepSpeed's -1 means not finite

    def skips_on_device(self, role: str) -> bool:
        return False

    def update(self, role: str, norm: Tensor, max_norm: float, skipped: Tensor | None = None) -> None:
        self.engines[role].optimizer.step()

    def skip(self, role: str) -> None:
        """DeepSpeed clears up after an overflow by itself: make it see one, on the processes that had none too."""
        zero = self.engines[role].optimizer
        for gradients in zero.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(torch.nan)
        zero.step()

    def pieces(self, role: str) -> list[Piece]:
        zero = self.engines[role].optimizer
        of = _piece_of_stage_2 if self.stage == 2 else _piece_of_stage_3
        found = (of(zero, name, parameter) for name, parameter in self.named[role].items())
        return [piece for piece in found if piece is not None]

    def refresh(self, role: str) -> None:
        zero = self.engines[role].optimizer
        if self.stage == 2:
            zero.update_lp_params()
            return
        whole = zero.persistent_parameters
        if whole:  # given up first: what is whole already would not be gathered again
            whole[0].partition(whole)
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if whole:
            whole[0].all_gather(whole)


def _piece_of_stage_2(zero: Any, name: str, parameter: Any) -> Piece | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it lies on other processes
        return None
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    start = mapping.lp_fragment_address.start
    held = mapping.hp_fragment_address
    return Piece(name, tuple(parameter.shape), start, held.numel, flat, held.start)


def _piece_of_stage_3(zero: Any, name: str, parameter: Any) -> Piece | None:
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = size * zero._get_param_partition_rank(parameter)
    numel = min(size, parameter.ds_numel - start)  # the last share is padded
    if numel <= 0:
        return None
    return Piece(name, tuple(parameter.ds_shape), start, numel, zero.fp32_partitioned_groups_flat[group], offset)


def _deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "the ZeRO backends need DeepSpeed", "install it (uv pip install deepspeed), or take BACKEND=fsdp2"
        ) from None
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of every optimizer that it does not know
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # serves inference alone, and would be compiled first
    )
    return deepspeed
