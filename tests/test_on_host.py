"""``--gradient-checkpointing host``: what networks keep for backward waits elsewhere, and comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_runs
import torch
from flow_models import save_flow
from launched import Plan, launch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from train_t2i import on_host
from train_t2i.families import Family, load_family
from train_t2i.networks import Networks
from train_t2i.on_host import KeptOnHost
from train_t2i.plan.ledger import Elsewhere, Ledger

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def family(request, tmp_path_factory, sdxl_folder: Path) -> Family:
    folder = sdxl_folder if request.param == "sdxl" else save_flow(tmp_path_factory.mktemp("flow") / "sd3", "sd3")
    return load_family("auto", str(folder))


class Watched(saved_tensors_hooks):
    """Copies, as a trip to the host and back makes them, and the storages that went."""

    def __init__(self) -> None:
        self.went: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            self.went.append(tensor.untyped_storage()._cdata)
            return tensor.clone()

        super().__init__(pack, lambda tensor: tensor)


def gradients(networks: Networks) -> dict[str, Tensor]:
    """Of both trained roles, on the same inputs."""
    family, g = networks.family, torch.Generator().manual_seed(3)
    x, t = torch.randn(2, family.latent_channels, 8, 8, generator=g), torch.tensor([0.3, 0.8])
    cond, found = family.encode(PROMPTS, None), {}
    for role in networks.trains:
        with networks.updating(role):
            networks.predict(role, x, t, cond).square().mean().backward()
        found |= {f"{role} {name}": p.grad for name, p in networks.named_parameters(role).items()}
    return found


@pytest.mark.parametrize("layout", ["shared", "paired"])
def test_gradients_are_the_same_and_weights_stay(family, layout, monkeypatch) -> None:
    def shaken(**options: bool) -> Networks:
        networks = tiny.networks(family, layout, checkpointing=True, **options)
        for net in networks.modules.values():
            tiny.shake(net)
        return networks

    watched: list[Watched] = []

    def to_host() -> Watched:
        watched.append(Watched())
        return watched[-1]

    monkeypatch.setattr(on_host, "to_host", to_host)
    monkeypatch.setattr(on_host, "SMALL_BYTES", 0)
    plain, networks = gradients(shaken()), shaken(keeps_on_host=True)
    kept = gradients(networks)
    assert plain.keys() == kept.keys()
    assert all(torch.equal(kept[name], plain[name]) for name in plain)
    went = {storage for one in watched for storage in one.went}
    weights = {p.untyped_storage()._cdata for net in networks.modules.values() for p in net.parameters()}
    assert len(watched) == len(networks.trains)
    assert went
    assert not went & weights


def test_small_tensors_stay(family, monkeypatch) -> None:
    """These networks keep nothing of a MiB."""
    watched = Watched()
    monkeypatch.setattr(on_host, "to_host", lambda: watched)
    gradients(tiny.networks(family, "shared", keeps_on_host=True))
    assert not watched.went


def test_a_call_without_a_graph_keeps_nothing(family, monkeypatch) -> None:
    networks = tiny.networks(family, "shared", keeps_on_host=True)
    monkeypatch.setattr(on_host, "to_host", lambda: pytest.fail("goes to the host"))
    x, t = torch.zeros(2, family.latent_channels, 8, 8), torch.full((2,), 0.5)
    networks.predict("teacher", x, t, family.encode(PROMPTS, None))


class Blocks(nn.Module):
    """Checkpointed blocks, of which each keeps its input."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("rows", [512, 1024])
def test_the_ledger_counts_what_stays_on_the_device(rows: int, monkeypatch) -> None:
    """Of eight kept inputs none but the one at work is there at once: seven of them less at the peak."""
    width, count = 1024, 8
    with torch.device("meta"):
        net, x = Blocks(count, width).requires_grad_(False), torch.empty(rows, width, requires_grad=True)
    elsewhere = Elsewhere()
    monkeypatch.setattr(on_host, "to_host", elsewhere.hooks)

    def peak(inside: Callable[[], saved_tensors_hooks] | None) -> int:
        x.grad = None
        with Ledger() as ledger:
            if inside is None:
                out = net(x)
            else:
                with inside():
                    out = net(x)
            out.sum().backward()
        return ledger.peak.activations

    kept = rows * width * 4
    forward = peak(None) - peak(lambda: KeptOnHost(net))
    assert forward == pytest.approx((count - 2) * kept, abs=2 * kept)
    assert elsewhere.bytes == count * kept


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_two_processes_that_share_out_weights_train_alike(backend, tmp_path: Path, prompts_file: Path) -> None:
    """Weights that were gathered for a call go to the host too, and come back as they were."""
    if backend == "zero3":
        pytest.importorskip("deepspeed")
    model = save_flow(tmp_path / "sd3", "sd3")

    def plan(way: str, fault: str) -> Plan:
        flags = (
            f"--use-lora-gen --sample-num-steps 2 --text-length 24 --backend {backend} --gradient-checkpointing {way}"
        )
        return Plan(way, tiny_runs.arguments(tmp_path, way, flags, model=model, prompts=prompts_file), fault)

    reports = launch(tmp_path, 2, [plan("on", "none"), plan("host", "kept_on_host")])
    assert [report["codes"] for report in reports] == [{"on": 0, "host": 0}] * 2
    on, host = (tiny_runs.weights(tmp_path / way, 2) for way in ("on", "host"))
    assert on.keys() == host.keys()
    assert all(torch.equal(on[name], host[name]) for name in on)
