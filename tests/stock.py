"""An exported student in stock diffusers: sampled with our noises, with what its network is told written down."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train_t2i.families.flow import pack
from train_t2i.randomness import seeded_noise
from train_t2i.student import RENOISE_OFFSET, ImageModel

PROMPTS, SEEDS = ("a red circle", "a large blue square left of a small green cross"), (3, 4)
PACKED = ("flux", "qwen_image")  # their pipelines take latents as tokens
RENOISES = ("scheduling_lcm", "scheduling_flow_match_euler_discrete")


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach().clone()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(key, inner)


def told(net: nn.Module) -> list[dict[str, Tensor]]:
    """Filled with the tensors that each later call of a denoiser is given, by their names."""
    names = list(inspect.signature(net.forward).parameters)
    calls: list[dict[str, Tensor]] = []

    def keep(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        everything = {**dict(zip(names, given, strict=False)), **named}
        calls.append(dict(pair for name, value in everything.items() for pair in leaves(name, value)))

    net.register_forward_pre_hook(keep, with_kwargs=True)
    return calls


def images(pipe: Any, model: ImageModel, monkeypatch: Any, **call: Any) -> Tensor:
    """Of ``pipe(prompts, **call)`` with the noises that ``model`` takes for ``SEEDS``."""
    family, num_steps = model.settings.run.model_family, call["num_inference_steps"]
    noises = [seeded_noise([s + i * RENOISE_OFFSET for s in SEEDS], model.latent_shape) for i in range(num_steps)]
    start, *later = [pack(x) for x in noises] if family in PACKED else noises
    waiting = iter(later if model.settings.run.sample_type == "sde" else [])
    with monkeypatch.context() as patched:
        for module in RENOISES:
            name = f"diffusers.schedulers.{module}.randn_tensor"
            patched.setattr(name, lambda shape, **options: next(waiting, torch.zeros(shape)))
        pipe.set_progress_bar_config(disable=True)
        made = pipe(list(PROMPTS), latents=start, output_type="pt", **call).images
    assert next(waiting, None) is None, "not every re-noising was drawn"
    return made


def assert_told_the_same(theirs: Sequence[dict[str, Tensor]], ours: Sequence[dict[str, Tensor]], grid: Tensor) -> None:
    """Every call; what stands in no image (time, text, ids, guidance) to the last bits of fp32, the images as they may be apart."""
    assert len(theirs) == len(ours) == len(grid) - 1
    for stock, mine in zip(theirs, ours, strict=True):
        assert stock.keys() == mine.keys() >= {"timestep", "encoder_hidden_states"}
        for name, tensor in mine.items():
            apart = 1e-4 if name in ("sample", "hidden_states") else 0
            scale = 2e-6 * float(tensor.abs().max()) if name == "timestep" else 0
            other = stock[name].to(tensor.dtype).expand_as(tensor)
            torch.testing.assert_close(
                other, tensor, rtol=0, atol=max(apart, scale), msg=lambda text, n=name: f"{n}: {text}"
            )


def assert_same(pipe: Any, model: ImageModel, monkeypatch: Any, call: dict[str, Any]) -> float:
    """``pipe`` samples as ``model`` does: the same calls of the network, the same images; how far these are apart at most."""
    ours, theirs = told(model.network), told(getattr(pipe, model.family.denoiser_name))
    mine = model.images(list(PROMPTS), list(SEEDS))
    made = images(pipe, model, monkeypatch, **call)
    assert_told_the_same(theirs, ours, model.family.path.grid(call["num_inference_steps"]))
    assert made.shape == mine.shape
    torch.testing.assert_close(made, mine, rtol=0, atol=1e-4)
    return float((made - mine).abs().max())
