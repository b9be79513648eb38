"""Frozen weights in 8 and 4 bits: the LoRA gradient is that of the rounded weights, and nothing else changes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from flow_models import save_flow
from safetensors.torch import load_file
from torch import Tensor, nn

from train_t2i import build
from train_t2i.base_quant import (
    BLOCK,
    CODE_BYTES,
    SCALE_BYTES,
    QuantizedLinear,
    quantized_layers,
)
from train_t2i.config import BASE_QUANTS, Config, DMDRConfig, Settings
from train_t2i.errors import UserError
from train_t2i.families import load_family
from train_t2i.networks import Networks

pytest.importorskip("bitsandbytes")
PROMPTS = ["a small red circle", "a large blue square left of a small green cross"]


def plain_of(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """The layer that ``layer`` stands for."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.dense(dtype))
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain.requires_grad_(False)


def passed(net: nn.Module, x: Tensor, low: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Output and the gradient of its input."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
        out = net(leaf)
    out.float().square().sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


# -- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASE_QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_plain_layer_of_its_weights(kind: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(96, 80, bias=bias).to(dtype), kind)
    x = torch.randn(2, 5, 96).to(dtype)
    for mine, theirs in zip(passed(layer, x), passed(plain_of(layer, dtype), x), strict=True):
        assert torch.equal(mine, theirs)
    low = torch.bfloat16
    for mine, theirs in zip(passed(layer, x, low), passed(plain_of(layer, low), x, low), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", BASE_QUANTS)
def test_weights_are_made_in_the_format_of_the_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    dense = QuantizedLinear.dense
    monkeypatch.setattr(QuantizedLinear, "dense", lambda self, dtype: asked.append(dtype) or dense(self, dtype))
    passed(QuantizedLinear(nn.Linear(96, 80), kind), torch.randn(5, 96), torch.bfloat16)
    assert asked == [torch.bfloat16, torch.bfloat16]  # forward and backward


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.006), ("fp8", 0.03), ("nf4", 0.11)])
def test_how_far_the_weights_are_rounded(kind: str, error: float) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(256, 256)
    off = QuantizedLinear(plain, kind).dense(torch.float32) - plain.weight.detach()
    assert float(off.norm() / plain.weight.detach().norm()) < error


@pytest.mark.parametrize("kind", BASE_QUANTS)
def test_the_bytes_of_a_layer_and_what_it_keeps_for_backward(kind: str) -> None:
    layer = QuantizedLinear(nn.Linear(256, 512, bias=False), kind)
    codes, scales = layer.weight, layer.scales
    assert codes.nbytes + scales.nbytes == 256 * 512 * (CODE_BYTES[kind] + SCALE_BYTES / BLOCK[kind])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 256, requires_grad=True))
    assert not kept


def test_a_layer_moves_to_another_device_whole() -> None:
    layer = QuantizedLinear(nn.Linear(64, 64), "nf4").to("meta")
    assert layer.dense(torch.bfloat16).is_meta
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 64)


# -- whole networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {"sdxl": sdxl_folder} | {name: save_flow(root / name, name) for name in ("sd3", "flux", "qwen_image")}


def made_plain(networks: Networks) -> Networks:
    """A copy whose quantised layers are the plain ones that they stand for."""
    other = copy.deepcopy(networks)
    for net in other.modules.values():
        for name, layer in [*net.named_modules()]:
            if isinstance(layer, QuantizedLinear):
                parent, _, child = name.rpartition(".")
                setattr(net.get_submodule(parent), child, plain_of(layer, torch.float32))
    return other


def gradients(networks: Networks, family: Any, role: Any) -> dict[str, Tensor]:
    channels = family.latent_channels
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = family.encode(PROMPTS)
    with networks.updating(role):
        networks.predict(role, x, torch.tensor([0.7, 0.3]), cond).square().mean().backward()
    return {key: p.grad for key, p in networks.named_parameters(role).items() if p.grad is not None}


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "qwen_image"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_lora_gradient_is_that_of_the_rounded_weights(
    name: str, checkpointing: bool, folders: dict[str, Path]
) -> None:
    options = {} if name == "sdxl" else {"text_length": 24, "size_px": (64, 64)}
    family = load_family("auto", str(folders[name]), **options)
    for kind in BASE_QUANTS:
        networks = tiny.networks(family, "shared", checkpointing=checkpointing, base_quant=kind)
        tiny.shake(networks.modules["base"])
        plain = made_plain(networks)
        for role in ("generator", "guidance"):
            mine, theirs = gradients(networks, family, role), gradients(plain, family, role)
            assert mine.keys() == theirs.keys() == networks.named_parameters(role).keys()
            for key, gradient in mine.items():
                torch.testing.assert_close(gradient, theirs[key], rtol=1e-5, atol=1e-7, msg=f"{kind} {key}")


@pytest.mark.parametrize("layout", ["shared", "paired", "paired_lora", "separate"])
def test_what_is_quantised_is_what_nothing_trains(layout: str, folders: dict[str, Path]) -> None:
    family = load_family("auto", str(folders["sdxl"]))
    bare = quantized_layers(family.load(torch.float32), family.block_names)
    assert bare
    assert all("transformer_blocks" in name or "resnets" in name for name in bare)
    networks = tiny.networks(family, layout, base_quant="int8")
    for name, net in networks.modules.items():
        found = [key.replace(".base_layer", "") for key, m in net.named_modules() if isinstance(m, QuantizedLinear)]
        trained = any(networks.routes[role] == (name, None) for role in networks.trains)
        assert found == ([] if trained else bare), name
        assert all(p.dtype == torch.uint8 for key, p in net.named_parameters() if key in {f"{f}.weight" for f in found})


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_bit_for_bit_and_its_student_stands_on_the_whole_base(trainer: Any, sdxl_folder: Path) -> None:
    from train_t2i.__main__ import main
    from train_t2i.student import load_student

    flags = "--use-lora-gen --base-quant nf4 --gradient-checkpointing --checkpoint-steps 1 --max-train-steps"
    whole, other = trainer.run("whole", f"{flags} 2"), trainer.run("other", f"{flags} 1")
    trainer.run("other", f"{flags} 2 --auto-resume")
    tiny.assert_same_checkpoint(whole, other, 2)
    usual = trainer.run("usual", "--use-lora-gen --checkpoint-steps 1")
    exported = [load_file(run / "checkpoints/lora_gen/step-2/adapter_model.safetensors") for run in (whole, usual)]
    assert {k: v.shape for k, v in exported[0].items()} == {k: v.shape for k, v in exported[1].items()}
    assert any(not torch.equal(exported[0][key], exported[1][key]) for key in exported[0])
    model = load_student(str(whole))
    assert not any(isinstance(module, QuantizedLinear) for module in model.network.modules())
    lora = {k.removeprefix("base_model.model."): v for k, v in exported[0].items()}
    held = {k.replace(".generator.", "."): p for k, p in model.network.named_parameters() if ".generator." in k}
    assert all(torch.equal(held[key], lora[key]) for key in lora)
    out = whole / "merged"
    assert main(["export", str(whole), "--to", "merged", "--out", str(out)]) == 0
    base = load_family("auto", str(sdxl_folder)).load(torch.float32).state_dict()
    merged = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    for key, weight in base.items():
        stem = key.removesuffix(".weight")
        if (up := lora.get(f"{stem}.lora_B.weight")) is not None:  # alpha is twice the rank
            added = 2 * up.flatten(1) @ lora[f"{stem}.lora_A.weight"].flatten(1)
            weight = weight + added.reshape(weight.shape)
        torch.testing.assert_close(merged[key], weight, rtol=0, atol=1e-6, msg=key)


def test_what_cannot_be_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(Config(base_quant="int8"), DMDRConfig())
    with pytest.raises(UserError, match="--base-quant int8 does not go with --backend zero2: quantised"):
        build.check_started(settings, "zero2", torch.device("cpu"))
    build.check_started(settings, "ddp", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="--base-quant needs bitsandbytes"):
        build.check_started(settings, "ddp", torch.device("cpu"))
    build.check_started(Settings(Config(), DMDRConfig()), "fsdp2", torch.device("cpu"))
