"""Roles -> (module, adapter): the only place where adapters are switched (adapters.py makes them).

``updating(role)`` keeps a role's adapter and scale on through forward AND backward, since gradient checkpointing re-runs the forward then; every other call switches and restores.
Shapes: x_t (B, C, H, W); t (B,) fp32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from train_t2i.adapters import AdapterSpec, Replaced, add_adapter
from train_t2i.base_quant import quantize_blocks
from train_t2i.compiled import compile_blocks
from train_t2i.config import LAYOUTS
from train_t2i.errors import UserError
from train_t2i.families.base import Cond, Family
from train_t2i.on_host import KeptOnHost

Role = Literal["generator", "guidance", "teacher"]


class Networks:
    """The modules of a run and the roles that are played on them.

    ``autocast`` is entered around network calls only.  The teacher may borrow the guidance adapter at a scale
    (dynamic distribution guidance): ``predict("teacher", ..., scale=s)`` is the base plus s times that adapter.
    """

    def __init__(
        self,
        family: Family,
        modules: dict[str, nn.Module],
        layout: str,
        trains: tuple[Role, ...],
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        named: Sequence[str] = (),
        keeps_on_host: bool = False,
    ) -> None:
        """``named``: parts of the names of a full generator's parameters that are trained; none: all are."""
        self.named, self.keeps_on_host = tuple(named), keeps_on_host
        self.family, self.modules, self.layout, self.trains = family, modules, layout, trains
        self.routes = LAYOUTS[layout]
        self.autocast = autocast
        self.num_calls = 0  # network calls so far; a guided one counts twice, since it carries twice the rows
        self._selected: dict[str, tuple[str | None, float]] = {}
        self._lora = {name: [m for m in net.modules() if isinstance(m, LoraLayer)] for name, net in modules.items()}
        self._replaced = {name: [m for m in net.modules() if isinstance(m, Replaced)] for name, net in modules.items()}
        self.entries: dict[Role, nn.Module] = {}  # what to call where a role builds a graph, if not its module
        self._updating: Role | None = None
        self._graph_scale: float | None = None
        for name in modules:
            self._select(name, None, 1.0)

    # -- who is trained ------------------------------------------------------------------------------------------

    def named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The trainable parameters of a role, by their name inside its module."""
        name, adapter = self.routes[role]
        parts = self.named if adapter is None and role == "generator" else ()
        named = self.modules[name].named_parameters()
        if adapter is not None:
            return {key: p for key, p in named if f".{adapter}." in key}
        return {key: p for key, p in named if not parts or any(part in key for part in parts)}

    def prepare(self, role: Role, prepare: Callable[..., nn.Module], adam: object) -> None:
        """Have ``prepare(role, module, named parameters, adam)`` make the role's optimizer; call what it returns."""
        module = self.modules[self.routes[role][0]]
        self.entries[role] = prepare(role, module, self.named_parameters(role), adam)

    def parameters(self, role: Role) -> list[nn.Parameter]:
        return list(self.named_parameters(role).values())

    @contextmanager
    def updating(self, role: Role) -> Iterator[None]:
        """Everything that ``role`` predicts inside builds a graph; leave only after its backward."""
        if self._updating is not None:
            raise RuntimeError(f"already updating {self._updating}")
        self._updating, self._graph_scale = role, None
        before = dict(self._selected)
        try:
            yield
        finally:
            self._updating = None
            for name, (adapter, scale) in before.items():
                self._select(name, adapter, scale)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the repeated blocks of all modules, in place; before anything is called or sharded."""
        compile_blocks(self.modules.values(), self.family.block_names, backend)

    # -- predictions ---------------------------------------------------------------------------------------------

    def predict(
        self, role: Role, x_t: Tensor, t: Tensor, cond: Cond, *, cfg: float | Tensor = 1.0, scale: float | None = None
    ) -> Tensor:
        """(B, C, H, W) raw network output, fp32.  ``cfg`` is a number or (B,); exactly 1 means no guidance.

        ``scale`` multiplies the role's adapter (1 unless given); for the teacher it is how much of the guidance adapter
        it borrows (0 unless given).  Builds a graph iff ``role`` is being updated, and not under ``torch.no_grad``.
        """
        scale = (0.0 if role == "teacher" else 1.0) if scale is None else scale
        name, adapter = self._route(role, scale)
        builds_graph = role == self._updating and torch.is_grad_enabled()
        if builds_graph and self._graph_scale not in (None, scale):
            raise RuntimeError(f"{role} was called at adapter scales {self._graph_scale} and {scale} in one update")
        before = self._selected[name]
        self._select(name, adapter, scale)
        self.num_calls += 1 if _unguided(cfg) else 2
        try:
            net = self.entries.get(role, self.modules[name]) if builds_graph else self.modules[name]
            kept = KeptOnHost(self.modules[name]) if builds_graph and self.keeps_on_host else nullcontext()
            with torch.set_grad_enabled(builds_graph), self.autocast(), kept:
                return self._guided(net, x_t, t, cond, cfg)
        finally:
            if builds_graph:  # stays on for the recomputation in backward
                self._graph_scale = scale
            else:
                self._select(name, *before)

    def x0(
        self, role: Role, x_t: Tensor, t: Tensor, cond: Cond, *, cfg: float | Tensor = 1.0, scale: float | None = None
    ) -> Tensor:
        """(B, C, H, W) fp32: the clean estimate behind ``predict``."""
        return self.family.path.to_x0(x_t, self.predict(role, x_t, t, cond, cfg=cfg, scale=scale), t)

    def _guided(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, cfg: float | Tensor) -> Tensor:
        if _unguided(cfg):
            return self.family.call(net, x_t, t, cond).float()
        # Classifier-free guidance (arXiv 2207.12598): both halves in one call
        out = self.family.call(net, torch.cat([x_t, x_t]), torch.cat([t, t]), cond.with_negative()).float()
        negative, positive = out.chunk(2)
        return self.family.guide(positive, negative, cfg)

    def _route(self, role: Role, scale: float) -> tuple[str, str | None]:
        name, adapter = self.routes[role]
        if role != "teacher" or scale == 0.0:
            return name, adapter
        guidance_module, guidance_adapter = self.routes["guidance"]
        if guidance_module != name:
            raise ValueError(f"layout {self.layout}: the teacher has no guidance adapter to borrow at scale {scale}")
        return name, guidance_adapter

    def _select(self, name: str, adapter: str | None, scale: float) -> None:
        """Switch a module's adapted layers; touches neither requires_grad nor any optimizer (peft's set_adapter does)."""
        if self._selected.get(name) == (adapter, scale):
            return
        for layer in self._lora[name]:
            layer._disable_adapters = adapter is None
            if adapter is not None and adapter in layer.lora_A:
                layer._active_adapter = [adapter]
                layer.scaling[adapter] = layer.lora_alpha[adapter] / layer.r[adapter] * scale
        for replaced in self._replaced[name]:
            replaced.active = adapter
        self._selected[name] = (adapter, scale)


def _unguided(cfg: float | Tensor) -> bool:
    return not isinstance(cfg, Tensor) and cfg == 1.0


def check_named(net: nn.Module | None, named: Sequence[str]) -> None:
    """Raises UserError for a part that no parameter's name has."""
    for part in named:
        if net is not None and not any(part in key for key, _ in net.named_parameters()):
            some = ", ".join(sorted({key.split(".")[0] for key, _ in net.named_parameters()}))
            raise UserError(f"--trainable-modules {part}: no parameter has it in its name", f"modules: {some}")


def build_networks(
    family: Family,
    layout: str,
    adapters: dict[Role, AdapterSpec],
    *,
    uses: tuple[Role, ...],
    trains: tuple[Role, ...],
    dtype: torch.dtype,
    place: Callable[[nn.Module, tuple[str, ...]], object],
    checkpointing: bool = False,
    keeps_on_host: bool = False,
    compiled: bool = False,
    base_quant: str = "none",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    prepare: Callable[[dict[str, nn.Module]], None] = lambda modules: None,
    adapt: Callable[[nn.Module, str], None] = lambda net, adapter: None,
    named: Sequence[str] = (),
) -> Networks:
    """Load what the used roles need, once; trained full modules in fp32, frozen ones in ``dtype``.

    ``base_quant`` keeps the blocks of frozen modules in fewer bits (base_quant.py), ``compiled`` compiles those of all
    (compiled.py).  ``prepare(modules)`` may load other weights into "gen" before adapters are put on (an initialised generator);
    ``named``: parts of the names of a full generator's parameters that are trained (none: all);
    ``adapt(net, adapter)`` gives the generator's adapter layers of its own; ``place(net, block class names)`` puts a finished network on the device.
    """
    routes = LAYOUTS[layout]
    needed = {routes[role][0] for role in uses}
    full = {routes[role][0] for role in trains if routes[role][1] is None}
    modules: dict[str, Any] = {name: family.load(torch.float32 if name in full else dtype) for name in sorted(needed)}
    prepare(modules)
    if base_quant != "none":
        for name in needed - full:
            quantize_blocks(modules[name], family.block_names, base_quant)
    for role in (r for r in uses if routes[r][1] is not None):
        net, adapter = modules[routes[role][0]], str(routes[role][1])
        add_adapter(net, family, adapter, adapters[role])
        if role == "generator":
            adapt(net, adapter)
    for net in modules.values():
        net.requires_grad_(False)
        if checkpointing:
            net.enable_gradient_checkpointing()
    networks = Networks(family, modules, layout, trains, autocast, named, keeps_on_host)
    check_named(modules.get("gen"), named)
    for role in trains:
        for parameter in networks.parameters(role):
            parameter.requires_grad_(True)
    if compiled:
        networks.compile()
    for net in modules.values():
        place(net, family.block_names)
    return networks
