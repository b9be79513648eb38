"""A tick on another device: all that it computes lies there, and the host waits for none of it.

No GPU is needed: torch's fake tensors carry a device, refuse to meet one of another device, and show the host no value.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from train_t2i import build, reward_terms, sampling
from train_t2i.cli import parse
from train_t2i.config import Settings
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
}


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


@pytest.mark.parametrize("case", CASES)
def test_a_tick_stays_on_its_device_and_shows_the_host_nothing(case, sdxl_folder, tiny_vae_folder, towers, monkeypatch):
    flags = CASES[case].format(**towers, tiny_vae=tiny_vae_folder)
    settings = parse(f"--pretrained-model {sdxl_folder} --resolution 32 {flags}".split())
    on_host = built(settings)

    def last_level(level: torch.Tensor) -> int:
        """What ``int`` is to the backward simulation: how many calls to make was drawn on the host."""
        assert level.device.type == "cpu"
        return settings.run.sample_num_steps - 1

    monkeypatch.setattr(sampling, "int", last_level, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method = moved(on_host, settings)
        latents, images = torch.zeros(2, *method.setting.latent_shape), torch.zeros(2, 3, 32, 32)
        batch = Batch([3, 4], PROMPTS, rows=[0, 1], images=images, seeds=[3, 4], num_steps=[1, 3], latents=latents)
        clock = Clock(tick=4, step=0, tick_in_step=4)
        rollout = method.rollout(batch, clock)
        for role in method.roles_at(clock):
            with method.setting.networks.updating(role):
                for loss, metrics in method.losses(role, rollout, clock):
                    assert {value.device for value in (loss, *metrics.values())} == {THERE}
                    assert set(metrics) == set(method.columns[role])


def test_what_the_test_above_relies_on():
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.ones(2, device=THERE)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(2)
        with pytest.raises(DataDependentOutputException):
            float(there.sum())
