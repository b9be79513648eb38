"""What an adapter is: LoRA factors by peft, and whole layers in the place of a network's own (ArcFlow's head)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from train_t2i.config import any_of
from train_t2i.errors import UserError
from train_t2i.families.base import Family

HOSTS = (nn.Linear, nn.Conv2d, LoraLayer)  # what a LoRA sits on; the last is one of these that has an adapter


@dataclass(frozen=True)
class AdapterSpec:
    """LoRA of one role: its factor is alpha / rank.  ``targets`` as ``Family.lora_targets``; empty: those."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = ()


class Replaced(nn.Module):
    """A layer of a network that an adapter may have one of its own for; the others see the network's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.own = base, nn.ModuleDict()
        self.active: str | None = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        own = self.active is not None and self.active in self.own
        return (self.own[str(self.active)] if own else self.base)(*arguments, **named)


def replace_layer(net: nn.Module, name: str, adapter: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Give ``adapter`` a layer of its own, in fp32, where ``net`` has its layer ``name``, which ``make`` is given."""
    parent, _, child = name.rpartition(".")
    holder = net.get_submodule(parent)
    layer = getattr(holder, child)
    if not isinstance(layer, Replaced):
        layer = Replaced(layer)
        setattr(holder, child, layer)
    layer.own[adapter] = make(layer.base).float()


def lora_config(family: Family, spec: AdapterSpec) -> LoraConfig:
    """Targets that are plain names are given as the list that peft's own files have, others as one expression."""
    targets = spec.targets or family.lora_targets
    plain = all(re.fullmatch(r"(\w|\\\.|\.)+", target) for target in targets)
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=[target.replace("\\", "") for target in targets] if plain else any_of(targets),
        init_lora_weights="gaussian",
    )


def layers_of(net: nn.Module) -> dict[str, nn.Module]:
    """All modules inside by name, but for what lies inside a layer that has an adapter."""
    adapted = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, LoraLayer))
    return {name: module for name, module in net.named_modules() if name and not name.startswith(adapted)}


def add_adapter(net: nn.Module, family: Family, adapter: str, spec: AdapterSpec) -> None:
    """Put the LoRA factors ``adapter`` on every target of ``net``, in fp32 whatever the base is kept in.

    Raises UserError for a target that no layer answers to (peft itself complains only if none does), or one that takes none.
    """
    layers = layers_of(net)
    for target in spec.targets or family.lora_targets:
        matched = [name for name in layers if re.fullmatch(any_of([target]), name)]
        if not matched:
            hint = "see --lora-targets" if spec.targets else "use a model of this architecture"
            raise UserError(f"the model has no layer {target} to put a LoRA on", hint)
        for name in matched:
            if not isinstance(layers[name], HOSTS):
                kind = type(layers[name]).__name__
                raise UserError(
                    f"--lora-targets {target}: {name} is a {kind}, which takes no LoRA",
                    "name linear layers, e.g. attn.to_q",
                )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters on one base are meant
        inject_adapter_in_model(lora_config(family, spec), net, adapter_name=adapter)
    for key, parameter in net.named_parameters():
        if f".{adapter}." in key:
            parameter.data = parameter.data.float()


def export_adapter(
    family: Family, adapter: str, spec: AdapterSpec, weights: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """An adapter as files: (file name -> its tensors, peft's adapter_config.json).

    ``adapter_model`` is the LoRA as peft saves it; ``replaced``, where there are any, the layers of the adapter's own, by
    the names that the network's have.
    """
    own = f".own.{adapter}."
    lora = {"base_model.model." + k.replace(f".{adapter}.", "."): t for k, t in weights.items() if own not in k}
    replaced = {key.replace(own, "."): tensor for key, tensor in weights.items() if own in key}
    config = lora_config(family, spec).to_dict()
    files = {"adapter_model": lora} | ({"replaced": replaced} if replaced else {})
    return files, {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
