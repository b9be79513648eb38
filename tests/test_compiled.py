"""Compiled blocks: equal to the plain ones, and compiled once a role, whatever rows, scales and guidance come after."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from flow_models import save_flow
from torch import Tensor
from torch._dynamo.utils import counters

from train_t2i import compiled, on_host
from train_t2i.__main__ import main
from train_t2i.build import check_started
from train_t2i.config import BASE_QUANTS, Config, DMDRConfig, Settings
from train_t2i.errors import UserError
from train_t2i.families import Family, load_family
from train_t2i.methods import METHODS, Batch, Setting
from train_t2i.methods.base import Clock
from train_t2i.networks import Networks

CPU = torch.device("cpu")
PROMPTS = [f"a red circle, number {i}" for i in range(5)]
RATIO = 2


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path) -> dict[str, Path]:
    return {"sdxl": sdxl_folder, "sd3": save_flow(tmp_path_factory.mktemp("flow") / "sd3", "sd3")}


@pytest.fixture(scope="module")
def families(folders: dict[str, Path]) -> dict[str, Family]:
    return {name: load_family("auto", str(folder)) for name, folder in folders.items()}


def build(family: Family, layout: str, backend: str | None, **options: Any) -> tuple[Networks, object]:
    """Networks with adapters that do something, and DMDR of four steps on them, its teacher's scale falling."""
    networks = tiny.networks(family, layout, **options)
    for net in networks.modules.values():
        tiny.shake(net)
    if backend is not None:
        networks.compile(backend)
    config = DMDRConfig(cfg_r=3.0, ratio_update=RATIO, dynamic_step=8, s_type_gui="beta")
    shape = (family.latent_channels, 8, 8)
    least_rows = 1 if backend is None else 2
    setting = Setting(networks, family, family.path.grid(4), shape, 4, CPU, least_rows=least_rows)
    return networks, METHODS["dmdr"](config, setting)


def tick(networks: Networks, method, number: int) -> dict[str, Tensor]:
    """The rollout, and loss and gradient of each update."""
    clock = Clock(number, number // RATIO, number % RATIO)
    rollout = method.rollout(Batch(range(5 * number, 5 * number + 5), PROMPTS), clock)
    found = {"rollout": rollout.x0}
    for role in method.roles_at(clock):
        parameters = networks.parameters(role)
        for parameter in parameters:
            parameter.grad = None
        with networks.updating(role):
            for loss, _ in method.losses(role, rollout, clock):
                loss.backward()
        found[f"{role} loss"] = loss.detach()
        found[f"{role} gradient"] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return found


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], apart: float = 1e-5) -> None:
    """As whole vectors."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0
        assert float((found[name] - value).norm() / value.norm()) < apart, name


def assert_whole_ticks_equal(family: Family, layout: str, backend: str = "aot_eager", **options: Any) -> None:
    """Nothing is compiled after the first step, although levels, rows and the teacher's scale differ in each tick."""
    plain, fast = (build(family, layout, b, **options) for b in (None, backend))
    for number in range(RATIO):
        assert_near(tick(*fast, number), tick(*plain, number))
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(RATIO, 4 * RATIO):
            assert_near(tick(*fast, number), tick(*plain, number))
    assert counters["stats"]["unique_graphs"] == made
    # the generator and the guidance network, each with a graph and without; no other way
    inner = {compiled._kind(m) for net in fast[0].modules.values() for m in net.modules()
             if type(m).__name__ in family.block_names}  # fmt: skip
    ways = 4 if layout == "shared" else 2
    assert made == ways * len(inner)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("sd3", "shared", {"checkpointing": True, "keeps_on_host": True}),
        ("sd3", "paired", {}),
        ("sdxl", "paired", {"checkpointing": True}),
        ("sdxl", "shared", {}),
    ],
)
def test_whole_ticks_compile_once_a_role(families, name, layout, options, monkeypatch):
    monkeypatch.setattr(on_host, "SMALL_BYTES", 0)  # where anything is kept on the host, everything is
    assert_whole_ticks_equal(families[name], layout, **options)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_ticks_on_codes_compile_once_a_role(families):
    pytest.importorskip("bitsandbytes")
    assert_whole_ticks_equal(families["sd3"], "shared", base_quant="nf4")


@pytest.mark.parametrize("kind", BASE_QUANTS)
def test_compiled_code_keeps_no_weight_that_codes_stand_for(families, kind):
    """As uncompiled: what is kept for backward is as many bytes."""
    pytest.importorskip("bitsandbytes")

    def kept(backend: str | None) -> int:
        networks, method = build(families["sd3"], "shared", backend, base_quant=kind)
        cond = method.setting.family.encode(PROMPTS[:2], "")
        x, t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.7])
        mine = {
            tensor.data_ptr() for net in networks.modules.values() for tensor in (*net.parameters(), *net.buffers())
        }
        found: dict[int, int] = {}
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda s: found.update({s.data_ptr(): s.nbytes}) or s, lambda s: s
        )
        with networks.updating("generator"), keep:
            networks.predict("generator", x, t, cond).square().mean().backward()
        return sum(size for place, size in found.items() if place not in mine)

    assert kept("aot_eager") <= kept(None)


def test_names_and_copies_are_those_of_plain_networks(families):
    (plain, _), (fast, _) = (build(families["sd3"], "shared", b) for b in (None, "eager"))
    assert list(fast.modules["base"].state_dict()) == list(plain.modules["base"].state_dict())
    assert [type(m) for m in fast.modules["base"].modules()] == [type(m) for m in plain.modules["base"].modules()]
    net = fast.modules["base"]
    block, other = (n.transformer_blocks[0] for n in (net, copy.deepcopy(net)))
    assert (block.forward.__self__, other.forward.__self__) == (block, other)


def test_the_scale_of_a_graph_outlives_another_of_the_same_adapter(families):
    """Between forward and backward the teacher borrows the adapter that is being updated, at another scale."""

    def gradient(backend: str | None) -> dict[str, Tensor]:
        networks, method = build(families["sd3"], "shared", backend)
        cond = method.setting.family.encode(PROMPTS[:2], "")
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([0.3, 0.7])
        with networks.updating("guidance"):
            out = networks.predict("guidance", x, t, cond, scale=2.0)
            borrowed = networks.predict("teacher", x, t, cond, scale=0.25)
            (out - borrowed).square().mean().backward()
        gradients = [p.grad.flatten() for p in networks.parameters("guidance") if p.grad is not None]
        return {"gradient": torch.cat(gradients)}

    assert_near(gradient("aot_eager"), gradient(None))


# -- whole runs, by torch's own compiler -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_compiled_run_is_the_plain_one_up_to_rounding_and_resumes(folders, prompts_file, tmp_path):
    flags = "--use-lora-gen --sample-num-steps 2 --text-length 24 --gradient-checkpointing --adam-epsilon 1e-2"
    plain, whole = (
        tiny_runs.train(tmp_path, name, f"{flags} {more}", model=folders["sd3"], prompts=prompts_file)
        for name, more in (("plain", ""), ("whole", "--compile blocks"))
    )
    files, theirs = (dict(tiny.checkpoint_files(root, 2)) for root in (whole, plain))
    assert files.keys() == theirs.keys()
    for name, content in files.items():
        assert content.keys() == theirs[name].keys(), name
    before, after, expected = (tiny_runs.weights(root, step) for root, step in ((plain, 1), (whole, 2), (plain, 2)))
    moved = max(float((expected[key] - before[key]).abs().max()) for key in before)
    assert max(float((expected[key] - after[key]).abs().max()) for key in before) < 1e-2 * moved
    cut = tiny_runs.stopped_at(whole, 1, "cut")
    tiny_runs.train(
        tmp_path, cut.name, f"{flags} --compile blocks --auto-resume", model=folders["sd3"], prompts=prompts_file
    )
    tiny.assert_same_checkpoint(whole, cut, 2)
    assert main(shlex.split(f"export {whole} --out {tmp_path / 'exported'}")) == 0


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch):
    def settings(**run: str) -> Settings:
        return Settings(Config(compile="blocks", **run), DMDRConfig())

    for backend in ("ddp", "fsdp2", "zero2", "zero3"):
        check_started(settings(), backend, CPU)
    check_started(settings(base_quant="int8"), "ddp", CPU)
    with monkeypatch.context() as patched:
        patched.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
        with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
            check_started(settings(), "ddp", CPU)
    monkeypatch.setattr(compiled, "FIRST", "9.0")
    with pytest.raises(UserError, match=r"needs torch 9\.0, this is "):
        check_started(settings(), "ddp", CPU)
