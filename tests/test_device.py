"""A tick on another device: all that it computes lies there, and the host waits for none of it, from prompts to update.

No GPU is needed: torch's fake tensors carry a device, refuse to meet one of another device, and show the host no value.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import FAMILIES, save_flow
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rewards
from train_t2i import build, reward_terms, sampling
from train_t2i.cli import parse
from train_t2i.config import Settings
from train_t2i.engine import AdamSettings, Engine, Flags
from train_t2i.families.base import Cond
from train_t2i.log import RunLog
from train_t2i.methods import METHODS, Batch, Method
from train_t2i.methods.base import Clock

THERE = torch.device("cuda", 0)
PROMPTS = ["a red circle", "two blue squares"]
REWARDED = "--lora-rank 2 --cfg-r 3 --cold-start-iter 0 --clip-reward-model {clip} --hpsv2-reward-model {hpsv2} --tiny-vae {tiny_vae}"
CASES = {
    "dmdr-1": REWARDED + " --use-lora-gen",
    "dmdr-4": "--sample-num-steps 4 --dynamic-step 9 --lora-scale-r 0.5 --s-type-gui beta --gui-a 4 " + REWARDED,
    "direct": "--method direct",
    "direct-rows": "--method direct --max-row-steps 3 --sample-num-steps 2 --step-checkpointing --backprop-steps 1 "
    "--sample-type ode --feature-model {clip} --tiny-vae {tiny_vae}",
    "sft": "--method sft --caption-dropout 0.5",
    "sd3": "--sample-num-steps 2 --lora-rank 2 --cfg-r 3 --cold-start-iter 9 --max-train-steps 9 --use-lora-gen --sample-type ode",
    "flux": "--method arcflow --sample-num-steps 2 --lora-rank 2 --use-lora-gen",
    "qwen_image": "--method arcflow --sample-num-steps 2 --lora-rank 2 --distill-cfg 3 --use-lora-gen",
}
OURS = tuple(str(Path(module.__file__).parent) for module in (build, rewards))  # folders


def built(settings: Settings) -> Method:
    """The method of a run, on the CPU, as the trainer builds it."""
    settings, cpu = build.resolved(settings), torch.device("cpu")
    kind = METHODS[settings.run.method]
    family = build.build_family(settings.run, torch.float32)
    networks = build.assemble(
        settings, family, uses=kind.uses, trains=kind.trains, dtype=torch.float32, place=lambda net, blocks: None
    )
    return build.build_method(
        settings, networks, cpu, reward_terms.build_terms(settings.method, torch.float32, cpu, False, 0)
    )


def moved(method: Method, settings: Settings) -> Method:
    """The same method with fake tensors on the device in place of its models' own."""
    setting = method.setting
    modules = [*setting.family._parts(), *setting.networks.modules.values(), *(t.score.model for t in setting.rewards)]
    for part in (part for module in modules for part in module.modules()):
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = nn.Parameter(fake_like(tensor), requires_grad=tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = fake_like(tensor)
    for term in setting.rewards:
        term.score.device, term.score.model.attn_mask = THERE, fake_like(term.score.model.attn_mask)
    setting.family.device = THERE
    return build.build_method(build.resolved(settings), setting.networks, THERE, setting.rewards)


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=THERE)


def there(cond: Cond) -> Cond:
    """A conditioning as fake tensors."""

    def fake(part: Any) -> Any:
        return fake_like(part) if isinstance(part, torch.Tensor) else there(part) if isinstance(part, Cond) else part

    return replace(cond, **{field.name: fake(getattr(cond, field.name)) for field in fields(cond)})


class Copies(TorchDispatchMode):
    """Collects where our own code copies from the host to the device and waits until the device has it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        asked = kwargs or {}
        made = func(*args, **asked)
        if func is torch.ops.aten._to_copy.default and asked.get("device") == THERE != args[0].device:
            frame = sys._getframe(1)
            while "site-packages/torch/" in frame.f_code.co_filename and frame.f_back:
                frame = frame.f_back
            if frame.f_code.co_filename.startswith(OURS) and not asked.get("non_blocking"):
                self.waited.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return made


def engine_there(method: Method, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on the device, with its optimizers; its backward only makes gradients."""
    engine = Engine(Flags("no"))
    engine.device = engine.backend.device = THERE

    def backward(role: str, loss: torch.Tensor, scale: float, last: bool) -> None:
        for parameter in engine.backend.tensors[role]:
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(engine.backend, "backward", backward)
    for role in method.trains:
        method.setting.networks.prepare(role, engine.prepare, AdamSettings(1e-3, (0.9, 0.999), 1e-8, 0.0, False))
    return engine


@pytest.mark.parametrize("case", CASES)
def test_a_tick_stays_on_its_device_and_the_host_waits_for_nothing(
    case, sdxl_folder, tiny_vae_folder, towers, tmp_path, monkeypatch
):
    flags = CASES[case].format(**towers, tiny_vae=tiny_vae_folder)
    folder = save_flow(tmp_path / case, case) if case in FAMILIES else sdxl_folder
    settings = parse(f"--pretrained-model {folder} --resolution 32 {flags}".split())
    on_host = built(settings)
    told = on_host.setting.family.encode(PROMPTS, "") if case in FAMILIES else None

    def last_level(level: torch.Tensor) -> int:
        """What ``int`` is to the backward simulation: how many calls to make was drawn on the host."""
        assert level.device.type == "cpu"
        return settings.run.sample_num_steps - 1

    monkeypatch.setattr(sampling, "int", last_level, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        method = moved(on_host, settings)
        if told is not None:  # encoding them is the pipeline's own code, and reads how long texts are
            monkeypatch.setattr(method.setting.family, "encode", lambda *asked: there(told))
        engine, log = engine_there(method, monkeypatch), RunLog(tmp_path, method.columns)
        latents, images = torch.zeros(2, *method.setting.latent_shape), torch.zeros(2, 3, 32, 32)
        batch = Batch([3, 4], PROMPTS, rows=[0, 1], images=images, seeds=[3, 4], num_steps=[1, 3], latents=latents)
        clock = Clock(tick=4, step=0, tick_in_step=4)
        copies.waited.clear()
        rollout = method.rollout(batch, clock)
        for role in method.roles_at(clock):
            with method.setting.networks.updating(role):
                for loss, metrics in method.losses(role, rollout, clock):
                    assert {value.device for value in (loss, *metrics.values())} == {THERE}
                    assert set(metrics) <= set(method.columns[role])
                    engine.backward(role, loss)
                    log.add(role, metrics)
            report = engine.step(role)
            log.add(role, {"grad_norm": report.grad_norm, "skipped": report.skipped})
            assert set(log._sums[role]) == set(log.columns[role]) - {"lr"}
        engine.any_process(False)
        log.end_tick(1, 0, 2)
        assert not copies.waited
        with pytest.raises(DataDependentOutputException):
            log.write()


def test_what_the_test_above_relies_on(monkeypatch):
    monkeypatch.setattr("test_device.OURS", str(Path(__file__).parent))
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.ones(2, device=THERE)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(2)
        with pytest.raises(DataDependentOutputException):
            float(there.sum())
        with Copies() as copies:
            torch.ones(2).to(THERE)
            torch.tensor([1.0], device=THERE)
            torch.ones(2).to(THERE, non_blocking=True)
        assert len(copies.waited) == 2
