"""Roles and adapters: layouts agree, checkpointing changes nothing, nobody moves another's weights, guidance is exact."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from train_t2i.adapters import AdapterSpec, export_adapter
from train_t2i.config import LAYOUTS, DMDRConfig
from train_t2i.families import Cond, Family, load_family
from train_t2i.methods import METHODS, Batch, Method, Setting
from train_t2i.methods.base import Clock
from train_t2i.networks import Networks

PROMPTS = ["a red circle", "a blue square", "two green stars"]
SHAPE = (4, 4, 4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(sdxl_folder) -> Family:
    return load_family("auto", str(sdxl_folder))


@pytest.fixture(scope="module")
def cond(family) -> Cond:
    return family.encode(PROMPTS, "")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(2))


T = torch.tensor([0.15, 0.5, 0.9])


def build(family: Family, layout: str, **options) -> Networks:
    """With adapters that do something."""
    networks = tiny.networks(family, layout, **options)
    for net in networks.modules.values():
        tiny.shake(net)
    return networks


@pytest.fixture(scope="module", params=LAYOUTS)
def networks(request, family) -> Networks:
    return build(family, request.param)


@pytest.fixture(scope="module")
def shared(family) -> Networks:
    return build(family, "shared")


def dmdr(networks: Networks, num_steps: int = 1, **settings) -> Method:
    config = DMDRConfig(**{"cfg_r": 3.0, "lora_scale_f": 2.0, **settings})
    grid = networks.family.path.grid(num_steps)
    return METHODS["dmdr"](config, Setting(networks, networks.family, grid, SHAPE, seed=4, device=CPU))


def merged(net: nn.Module, adapter: str | None, scale: float) -> nn.Module:
    """A copy without adapters whose weights are W + scale * (alpha / r) * B A, by hand."""
    net = copy.deepcopy(net)
    for name, layer in [(n, m) for n, m in net.named_modules() if isinstance(m, LoraLayer)]:
        base = layer.base_layer
        if adapter is not None and adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            factor = scale * layer.lora_alpha[adapter] / layer.r[adapter]
            delta = (up.flatten(1) @ down.flatten(1)).reshape(base.weight.shape)
            base.weight.data += factor * delta
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, base)
    return net


def plain(family: Family, net: nn.Module, x: Tensor, cond: Cond) -> Tensor:
    with torch.no_grad():
        return family.call(net, x, T, replace(cond, negative=None))


# -- what a role predicts --------------------------------------------------------------------------------------------


def test_every_role_is_its_module_with_its_adapter_at_its_scale(networks, family, cond, x):
    for role, scale in [("generator", 1.0), ("guidance", 1.0), ("guidance", 2.0), ("guidance", 0.0), ("teacher", None)]:
        module, adapter = networks.routes[role]
        expected = plain(family, merged(networks.modules[module], adapter, 1.0 if scale is None else scale), x, cond)
        found = networks.predict(role, x, T, cond, scale=scale)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not found.requires_grad


def test_the_teacher_is_the_base_bit_for_bit(networks, family, cond, x):
    bare = plain(family, family.load(torch.float32), x, cond)
    networks.predict("guidance", x, T, cond, scale=2.0)
    assert torch.equal(networks.predict("teacher", x, T, cond), bare)
    if networks.layout != "separate":
        assert torch.equal(networks.predict("teacher", x, T, cond, scale=0.0), bare)
        assert not torch.equal(networks.predict("teacher", x, T, cond, scale=0.5), bare)


def test_the_teacher_borrows_the_guidance_adapter(networks, family, cond, x):
    """Dynamic distribution guidance: base + s x adapter."""
    if networks.layout == "separate":
        with pytest.raises(ValueError, match="no guidance adapter"):
            networks.predict("teacher", x, T, cond, scale=0.5)
        return
    expected = plain(family, merged(networks.modules["base"], "guidance", 0.35), x, cond)
    torch.testing.assert_close(networks.predict("teacher", x, T, cond, scale=0.35), expected, rtol=1e-4, atol=1e-5)


def test_x0_is_the_clean_estimate_behind_the_prediction(shared, family, cond, x):
    out = shared.predict("guidance", x, T, cond, cfg=2.0, scale=2.0)
    assert torch.equal(shared.x0("guidance", x, T, cond, cfg=2.0, scale=2.0), family.path.to_x0(x, out, T))


# -- classifier-free guidance ----------------------------------------------------------------------------------------


class Rows:
    """Rows of each call of a network."""

    def __init__(self, *nets: nn.Module) -> None:
        self.seen: list[int] = []
        self.hooks = [net.register_forward_pre_hook(self._keep) for net in nets]

    def _keep(self, module, positional) -> None:
        self.seen.append(len(positional[0]))

    def __enter__(self) -> list[int]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def test_guidance_is_uncond_plus_w_times_the_difference_in_one_call(shared, family, cond, x):
    positive = shared.predict("teacher", x, T, cond)
    negative = shared.predict("teacher", x, T, cond.negative)
    with Rows(shared.modules["base"]) as rows:
        before = shared.num_calls
        guided = shared.predict("teacher", x, T, cond, cfg=3.5)
        assert shared.num_calls - before == 2
        one = shared.predict("teacher", x, T, cond, cfg=1.0)
        assert shared.num_calls - before == 3
    assert rows == [6, 3]
    assert torch.equal(one, positive)
    torch.testing.assert_close(guided, negative + 3.5 * (positive - negative), rtol=1e-4, atol=1e-4)


def test_no_guidance_needs_no_negative(shared, family, x):
    shared.predict("teacher", x, T, family.encode(PROMPTS, None), cfg=1.0)
    with pytest.raises(ValueError, match="negative"):
        shared.predict("teacher", x, T, family.encode(PROMPTS, None), cfg=2.0)


def test_guidance_a_row_is_row_by_row(shared, family, cond, x):
    weights = torch.tensor([1.0, 4.0, 7.5])
    together = shared.predict("teacher", x, T, cond, cfg=weights)
    for row in range(3):
        alone = shared.predict(
            "teacher", x[row : row + 1], T[row : row + 1], family.encode([PROMPTS[row]], ""), cfg=float(weights[row])
        )
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-4)


# -- updates ---------------------------------------------------------------------------------------------------------


def gradients(networks: Networks) -> dict[str, Tensor]:
    return {
        f"{module}/{name}": p.grad.clone()
        for module, net in networks.modules.items()
        for name, p in net.named_parameters()
        if p.grad is not None
    }


def clear(networks: Networks) -> None:
    for net in networks.modules.values():
        net.zero_grad(set_to_none=True)


def update(networks: Networks, role: str, x: Tensor, cond: Cond, nested: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of an update in which, between forward and backward, others are called at other scales."""
    clear(networks)
    scale = 2.0 if role == "guidance" else None
    other = "guidance" if role == "generator" else "generator"
    with networks.updating(role):
        out = networks.predict(role, x, T, cond, scale=scale)
        if nested:
            networks.predict("teacher", x, T, cond, cfg=3.0)
            if networks.layout != "separate":
                networks.predict("teacher", x, T, cond, cfg=3.0, scale=0.3)
            networks.predict(other, x, T, cond, scale=0.5)
            networks.predict(other, x, T, cond)
        out.square().mean().backward()
    found = gradients(networks)
    clear(networks)
    return out.detach(), found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_and_calls_of_others_change_no_gradient(family, cond, x, layout):
    """The recomputation in backward must run under the adapter and the scale of the forward."""
    bare, checkpointed = (build(family, layout, checkpointing=on) for on in (False, True))
    for role in ("generator", "guidance"):
        value, reference = update(bare, role, x, cond, nested=False)
        assert reference
        assert all(gradient.abs().sum() > 0 for gradient in reference.values() if gradient.numel() > 1)
        for networks in (bare, checkpointed):
            with Rows(next(m for m in networks.modules[networks.routes[role][0]].modules() if is_block(m))) as calls:
                found, gradient = update(networks, role, x, cond, nested=True)
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
            assert gradient.keys() == reference.keys()
            for name in gradient:
                torch.testing.assert_close(gradient[name], reference[name], rtol=1e-4, atol=1e-6, msg=name)
        assert calls.count(3) >= 2  # the last one did recompute


def is_block(module: nn.Module) -> bool:
    return type(module).__name__ == "ResnetBlock2D"


def test_an_update_restores_what_was_selected(shared, family, cond, x):
    base = plain(family, merged(shared.modules["base"], None, 0.0), x, cond)
    for role in ("generator", "guidance"):
        update(shared, role, x, cond, nested=True)
        torch.testing.assert_close(plain(family, shared.modules["base"], x, cond), base, rtol=1e-5, atol=1e-6)


def test_only_the_updated_role_builds_a_graph(networks, cond, x):
    for role in ("generator", "guidance"):
        assert not networks.predict(role, x, T, cond).requires_grad
        with networks.updating(role):
            for called in ("generator", "guidance", "teacher"):
                assert networks.predict(called, x, T, cond).requires_grad == (called == role)


def test_mistakes_in_an_update_are_refused(shared, cond, x):
    with shared.updating("generator"):
        with pytest.raises(RuntimeError, match="already updating"), shared.updating("guidance"):
            pass
        shared.predict("generator", x, T, cond)
        shared.predict("generator", x, T, cond)
        with pytest.raises(RuntimeError, match="scales"):
            shared.predict("generator", x, T, cond, scale=0.5)
    with shared.updating("generator"):  # another update, another scale
        shared.predict("generator", x, T, cond, scale=0.5)


def test_an_update_that_fails_ends(shared, cond, x):
    with pytest.raises(ZeroDivisionError), shared.updating("generator"):
        raise ZeroDivisionError
    with shared.updating("guidance"):
        assert shared.predict("guidance", x, T, cond).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_moves_its_own_role_alone(family, layout):
    """A whole tick of DMDR; the teacher never moves."""
    networks = build(family, layout)
    method, batch = dmdr(networks), Batch(range(2), PROMPTS[:2])
    teacher = {k: v.clone() for k, v in merged(networks.modules["base"], None, 0.0).state_dict().items()}
    rollout = method.rollout(batch, Clock())
    for role in ("guidance", "generator"):
        before = {
            f"{m}/{n}": p.detach().clone() for m, net in networks.modules.items() for n, p in net.named_parameters()
        }
        own = networks.parameters(role)
        with networks.updating(role):
            for loss, _ in method.losses(role, rollout, Clock()):
                loss.backward()
        with_gradient = gradients(networks)
        torch.optim.SGD(own, lr=1.0).step()
        clear(networks)
        module = networks.routes[role][0]
        expected = {f"{module}/{name}" for name in networks.named_parameters(role)}
        assert with_gradient.keys() == expected
        moved = {
            f"{m}/{n}"
            for m, net in networks.modules.items()
            for n, p in net.named_parameters()
            if not torch.equal(p, before[f"{m}/{n}"])
        }
        assert moved
        assert moved <= expected
    for name, value in merged(networks.modules["base"], None, 0.0).state_dict().items():
        assert torch.equal(value, teacher[name]), name


def test_parameters_are_those_of_the_layout(networks):
    for role in ("generator", "guidance"):
        module, adapter = networks.routes[role]
        named = networks.named_parameters(role)
        assert all(p.requires_grad and p.dtype == torch.float32 for p in named.values())
        if adapter is None:
            assert named.keys() == dict(networks.modules[module].named_parameters()).keys()
        else:
            assert named
            assert all(f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name for name in named)
    trained = {id(p) for role in ("generator", "guidance") for p in networks.parameters(role)}
    frozen = [p for net in networks.modules.values() for p in net.parameters() if id(p) not in trained]
    assert not any(p.requires_grad for p in frozen)


def test_adapters_are_fp32_and_full_networks_have_fp32_masters(family):
    from train_t2i.networks import build_networks

    for layout in LAYOUTS:
        specs = {"guidance": AdapterSpec(2, 2), "generator": AdapterSpec(4, 8)}
        networks = build_networks(
            family, layout, specs, uses=("generator", "guidance", "teacher"), trains=("generator", "guidance"),
            dtype=torch.bfloat16, place=lambda net, blocks: None,
        )  # fmt: skip
        for role in ("generator", "guidance"):
            assert {p.dtype for p in networks.parameters(role)} == {torch.float32}
        frozen = [p for p in networks.modules["base"].parameters() if not p.requires_grad]
        assert {p.dtype for p in frozen} == {torch.bfloat16}


# -- layouts agree ---------------------------------------------------------------------------------------------------


def test_shared_is_paired_at_the_start(family, cond, x):
    """LoRA starts as nothing: same predictions; and the gradient of a factor follows from the full gradient.

    With W' = W + s B A and B = 0: dL/dB = s dL/dW A^T and dL/dA = 0.
    """
    found = {}
    for layout in ("shared", "paired"):
        networks = tiny.networks(family, layout)
        method = dmdr(networks)
        rollout = method.rollout(Batch(range(2), PROMPTS[:2]), Clock())
        values = [networks.predict(role, x, T, cond, cfg=cfg) for role in tiny.ROLES for cfg in (1.0, 3.0)]
        tiny.shake(networks.modules["base"], "lora_B.guidance")  # so that there is a score difference
        if layout == "paired":
            copy_adapter(found["shared"][0], networks)
        with networks.updating("generator"):
            ((loss, _),) = method.losses("generator", rollout, Clock())
            loss.backward()
        found[layout] = networks, rollout, values, loss.detach()
    (shared, rollout, values, loss), (paired, rollout_2, values_2, loss_2) = found["shared"], found["paired"]
    for mine, other in zip(values, values_2, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.x0, rollout_2.x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, loss_2, rtol=1e-4, atol=1e-7)
    full = dict(paired.modules["gen"].named_parameters())
    compared = 0
    for name, layer in shared.modules["base"].named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        down, up = layer.lora_A["generator"].weight, layer.lora_B["generator"].weight
        assert down.grad.abs().max() == 0
        scale = layer.lora_alpha["generator"] / layer.r["generator"]
        assert scale == 2  # the published factor: rank 2R, alpha 4R
        expected = scale * full[f"{name}.weight"].grad.flatten(1) @ down.flatten(1).T
        torch.testing.assert_close(up.grad.flatten(1), expected, rtol=1e-3, atol=1e-6, msg=name)
        compared += 1
    assert compared > 40


def copy_adapter(source: Networks, target: Networks) -> None:
    """The guidance adapters of two layouts start from different draws."""
    mine = source.named_parameters("guidance")
    with torch.no_grad():
        for name, parameter in target.named_parameters("guidance").items():
            parameter.copy_(mine[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_used_is_loaded(family, layout):
    networks = tiny.networks(family, layout, uses=("generator",), trains=("generator",))
    assert set(networks.modules) == {LAYOUTS[layout]["generator"][0]}
    names = [name for net in networks.modules.values() for name, _ in net.named_parameters()]
    assert not any("guidance" in name for name in names)


def test_a_role_that_is_used_but_not_trained_is_frozen(family):
    networks = tiny.networks(family, "shared", trains=("guidance",))
    assert networks.parameters("generator")
    assert not any(p.requires_grad for p in networks.parameters("generator"))
    assert all(p.requires_grad for p in networks.parameters("guidance"))


# -- network calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize(("num_steps", "ratio"), [(1, 1), (1, 5), (4, 2), (4, 5)])
def test_network_calls_of_a_step_are_those_derived(family, monkeypatch, num_steps, ratio, reused):
    """docs/performance.md: ratio (N + 3) + (3 + 1 + 2) with a backward as two: 41 at N = 4, ratio 5; one less if reused."""
    networks = tiny.networks(family, "paired")
    method = dmdr(networks, num_steps, ratio_update=ratio, reuse_rollout=reused)
    top = torch.tensor([num_steps - 1] * 2)  # every row goes to the end
    monkeypatch.setattr(type(method.level_times), "sample_index", lambda *args: top)
    forwards, backwards, seen, clock = 0, 0, 0, Clock()
    before = networks.num_calls
    with Rows(*networks.modules.values()) as rows:
        for tick in range(ratio):
            rollout = method.rollout(Batch(range(2), PROMPTS[:2]), clock)
            for role in method.roles_at(clock):
                with networks.updating(role):
                    backwards += len(list(method.losses(role, rollout, clock)))
            clock = Clock(tick + 1, 0, tick + 1)
        seen = sum(rows) // 2
    forwards = networks.num_calls - before
    assert forwards == seen
    assert forwards == ratio * (num_steps + 1) + 1 + 1 + 2 - reused
    assert forwards + 2 * backwards == ratio * (num_steps + 3) + (3 + 1 + 2) - reused
    if (num_steps, ratio) == (4, 5):
        assert forwards + 2 * backwards == 41 - reused


def test_the_simulation_stops_at_the_largest_level_drawn(family, monkeypatch):
    networks = tiny.networks(family, "shared")
    method = dmdr(networks, 4)
    for level in ([0, 0], [1, 0], [0, 2]):
        monkeypatch.setattr(type(method.level_times), "sample_index", lambda *args, level=level: torch.tensor(level))
        before = networks.num_calls
        method.rollout(Batch(range(2), PROMPTS[:2]), Clock())
        assert networks.num_calls - before == max(level) + 1


def test_a_row_is_told_its_own_prompt_in_every_call_of_the_simulation(family, monkeypatch):
    """Rows that have reached their level leave the batch: each row gets what it gets where all go to the end."""
    networks = tiny.networks(family, "shared")
    tiny.shake(networks.modules["base"])
    method, batch = dmdr(networks, 4), Batch(range(4), [*PROMPTS, "nothing at all"])
    drawn = torch.tensor([1, 0, 3, 2])
    monkeypatch.setattr(type(method.level_times), "sample_index", lambda *args: drawn)
    with Rows(*networks.modules.values()) as rows:
        mine = method.rollout(batch, Clock()).x0
    assert rows == [4, 3, 2, 1]
    for level in range(4):
        alone = torch.full((4,), level)
        monkeypatch.setattr(type(method.level_times), "sample_index", lambda *args, alone=alone: alone)
        whole = method.rollout(batch, Clock()).x0
        (row,) = (drawn == level).nonzero()[0].tolist()
        torch.testing.assert_close(mine[row], whole[row], rtol=1e-4, atol=1e-5)


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["generator", "guidance"])
def test_an_exported_adapter_is_read_by_peft(shared, family, cond, x, tmp_path, role):
    spec = {"guidance": AdapterSpec(2, 2), "generator": AdapterSpec(4, 8)}[role]
    weights = {name: p.detach() for name, p in shared.named_parameters(role).items()}
    files, config = export_adapter(shared.family, role, spec, weights)
    assert list(files) == ["adapter_model"]
    tensors = files["adapter_model"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = PeftModel.from_pretrained(family.load(torch.float32), tmp_path)
    found = plain(family, theirs.base_model.model, x, cond)
    torch.testing.assert_close(found, shared.predict(role, x, T, cond), rtol=1e-4, atol=1e-5)
