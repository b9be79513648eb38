"""SD3, FLUX.1 and Qwen-Image against diffusers: what the network is fed, where a sample goes, what an image decodes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_models import CALLS, CFG, FAMILIES, NEGATIVE, load_pipeline, save_flow
from torch import Tensor

from train_t2i.config import any_of
from train_t2i.families import Cond, family_of, load_family
from train_t2i.families.flow import pack, unpack
from train_t2i.networks import Networks
from train_t2i.sampling import many_step

PROMPTS = ["a small red circle", "a large blue square left of a small green cross, grey background"]
HEIGHT, WIDTH = 48, 64  # pixels: not square
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {name: save_flow(root / name, name) for name in FAMILIES}


def ours(folder: Path, **options: Any) -> Any:
    return load_family("auto", str(folder), size_px=(HEIGHT, WIDTH), text_length=24, **options)


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def pipeline_latents(name: str, x: Tensor) -> Tensor:
    """Latents in the shape that the pipeline's call takes."""
    return x if name == "sd3" else pack(x)


class Recorder:
    """Keeps what a network is called with."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        net.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, net: torch.nn.Module, positional: Any, named: dict[str, Any]) -> None:
        self.calls.append({**named, **({"hidden_states": positional[0]} if positional else {})})


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_reads_the_family_off_the_folder(name: str, folders: dict[str, Path]) -> None:
    assert family_of(str(folders[name])) == name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_is_fed_what_the_pipeline_feeds_it(name: str, folders: dict[str, Path]) -> None:
    """Tokens, pooled vector, mask, time, position ids, guidance: equal, row by row."""
    pipe, family = load_pipeline(folders[name], name), ours(folders[name])
    theirs = Recorder(pipe.transformer)
    x = noise(1)
    told = {key: value for key, value in CALLS[name].items() if key not in ("true_cfg_scale", "negative_prompt")}
    if name == "sd3":
        told["guidance_scale"] = 0.0
    pipe(PROMPTS[1], height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=pipeline_latents(name, x),
         output_type="latent", **told)  # fmt: skip
    net = family.load(torch.float32)
    mine = Recorder(net)
    t = family.path.dense_grid(2)[:1]
    with torch.no_grad():
        family.call(net, x, t, family.encode([PROMPTS[1]]))
    expected, (found,) = theirs.calls[0], mine.calls
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[key].float(), value.float(), rtol=0, atol=0, msg=f"{name}: {key}")
        elif key not in ("joint_attention_kwargs", "attention_kwargs"):
            assert found.get(key) == value, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_the_time_is_rounded_as_the_pipeline_rounds_it(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    """What goes into the sinusoids at each time of a shifted grid, under autocast as in training."""
    pipe = load_pipeline(folders[name], name).to(dtype)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.2)
    expected = times_at_the_sinusoids(pipe.transformer.time_text_embed)
    sigmas = {} if name == "sd3" else {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    told = {"true_cfg_scale": 1.0} if name == "qwen_image" else {"guidance_scale": 1.0}
    told |= {"max_sequence_length": 24}
    pipe(PROMPTS[1], height=HEIGHT, width=WIDTH, num_inference_steps=4, output_type="latent", **sigmas, **told)
    family = ours(folders[name], dtype=dtype)
    net = family.load(dtype)
    found = times_at_the_sinusoids(net.time_text_embed)
    cond = family.encode([PROMPTS[1]])
    for t in pipe.scheduler.timesteps / 1000:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            family.call(net, noise(1), t[None], cond)
    assert len(found) == len(expected) == 4
    assert found == expected


def times_at_the_sinusoids(embedding: torch.nn.Module) -> list[float]:
    """Filled at every call with the time of its first row, in the network's unit."""
    seen: list[float] = []
    embedding.register_forward_pre_hook(lambda module, given: seen.append(float(given[0][0])))
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_many_steps_visit_the_pipelines_latents(name: str, folders: dict[str, Path]) -> None:
    """The teacher's sampler, guidance included, step by step against the stock pipeline."""
    pipe, family = load_pipeline(folders[name], name), ours(folders[name])
    seen: list[Tensor] = []

    def keep(pipe: Any, i: int, t: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = told["latents"]
        seen.append(latents if name == "sd3" else unpack(latents, HEIGHT // 8, WIDTH // 8))
        return told

    nets = tiny.networks(family, "paired", uses=("teacher",), trains=())
    for row, prompt in enumerate(PROMPTS):
        seen.clear()
        x = noise(1, row)
        pipe(prompt, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, latents=pipeline_latents(name, x),
             output_type="latent", callback_on_step_end=keep, **CALLS[name])  # fmt: skip
        mine = visited(nets, family.encode([prompt], NEGATIVE[name]), CFG[name], x)
        for i, (found, expected) in enumerate(zip(mine, seen, strict=True)):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=f"{name}, row {row}, step {i}")


def visited(nets: Networks, cond: Cond, cfg: float, x: Tensor) -> list[Tensor]:
    """The latents after each of the teacher's steps from ``x``."""
    inputs: list[Tensor] = []

    def x0_at(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x)
        return nets.x0("teacher", x, t, cond, cfg=cfg)

    last = many_step(x0_at, nets.family.path, STEPS, x)
    return [*inputs[1:], last]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_one_batch_do_not_see_each_other(name: str, folders: dict[str, Path]) -> None:
    """Prompts of different lengths, together and alone; with guidance, whose empty text is shorter still."""
    family = ours(folders[name])
    nets = tiny.networks(family, "paired", uses=("teacher",), trains=())
    x, t = noise(2), torch.tensor([0.9, 0.4])
    together = nets.predict("teacher", x, t, family.encode(PROMPTS, ""), cfg=3.0)
    joined = nets.predict("teacher", x, t, Cond.cat([family.encode([p], "") for p in PROMPTS]), cfg=3.0)
    for row, prompt in enumerate(PROMPTS):
        alone = nets.predict("teacher", x[row : row + 1], t[row : row + 1], family.encode([prompt], ""), cfg=3.0)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(joined[row], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_equals_the_pipelines_and_to_latents_undoes_it(name: str, folders: dict[str, Path]) -> None:
    pipe, family = load_pipeline(folders[name], name), ours(folders[name])
    z = noise(2)
    if name == "qwen_image":
        mean, std = (torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        expected = pipe.vae.decode((z * std + mean).unsqueeze(2)).sample[:, :, 0]
    else:
        expected = pipe.vae.decode(z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    expected = pipe.image_processor.postprocess(expected.detach(), output_type="pt")
    torch.testing.assert_close(family.decode(z), expected, rtol=1e-5, atol=1e-5)
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    raw = pipe.vae.encode(images.unsqueeze(2) * 2 - 1 if name == "qwen_image" else images * 2 - 1).latent_dist.mode()
    if name == "qwen_image":
        told = (raw[:, :, 0] - mean) / std
    else:
        told = (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(family.to_latents(images), told, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpointed_decoder_has_the_same_gradient(name: str, folders: dict[str, Path]) -> None:
    z = noise(1)
    gradients = []
    for checkpointed in (False, True):
        family = ours(folders[name], checkpoint_decoder=checkpointed)
        leaf = z.clone().requires_grad_()
        family.decode(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline, QwenImagePipeline

    x = noise(2)
    _, channels, height, width = x.shape
    expected = FluxPipeline._pack_latents(x, 2, channels, height, width)
    assert torch.equal(pack(x), expected)
    assert torch.equal(pack(x), QwenImagePipeline._pack_latents(x, 2, channels, height, width))
    assert torch.equal(unpack(expected, height, width), x)
    assert torch.equal(FluxPipeline._unpack_latents(expected, HEIGHT, WIDTH, 8), x)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_factor_learns(name: str, checkpointing: bool, folders: dict[str, Path]) -> None:
    """No target is left out, none is unused, and none lies outside the repeated blocks."""
    family = ours(folders[name])
    nets = tiny.networks(family, "shared", checkpointing=checkpointing)
    tiny.shake(nets.modules["base"])
    with nets.updating("generator"):
        out = nets.predict("generator", noise(2), torch.tensor([0.7, 0.3]), family.encode(PROMPTS))
        out.square().mean().backward()
    silent = [key for key, p in nets.named_parameters("generator").items() if p.grad is None or not p.grad.any()]
    assert not silent
    blocks = [
        key for key, module in nets.modules["base"].named_modules() if type(module).__name__ in family.block_names
    ]
    assert all(any(key.startswith(f"{block}.") for block in blocks) for key in nets.named_parameters("generator"))


def test_a_target_is_the_end_of_a_name() -> None:
    import re

    wanted = re.compile(any_of([r"attn\.to_q", r"single_transformer_blocks\.\d+\.proj_out"]))
    names = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.12.proj_out")
    others = ("proj_out", "transformer_blocks.0.attn2.to_q", "transformer_blocks.0.attn.to_q.lora_A")
    assert [bool(wanted.fullmatch(name)) for name in (*names, *others)] == [True, True, False, False, False]


def test_second_attention_of_sd35_medium_is_a_target(folders: dict[str, Path]) -> None:
    family = ours(folders["sd3"])
    assert not any("attn2" in target for target in family.lora_targets)
    family.config["dual_attention_layers"] = [0, 1]
    assert r"attn2\.to_q" in family.lora_targets


@pytest.mark.parametrize(("name", "size", "expected"), [
    ("sd3", (1024, 1024), 3.0), ("flux", (1024, 1024), 3.1582), ("flux", (512, 512), 1.8776),
    ("qwen_image", (1328, 1328), 2.3033),
])  # fmt: skip
def test_the_models_own_shift(name: str, size: tuple[int, int], expected: float, folders: dict[str, Path]) -> None:
    """exp(1.15) at FLUX.1's 4096 tokens; its line between 256 and 4096 tokens; SD3's is fixed."""
    family = load_family("auto", str(folders[name]), shift=None, size_px=size)
    assert family.own_shift() == pytest.approx(expected, abs=2e-4)
    assert family.path.shift == family.own_shift()


def test_flux_is_told_its_guidance_and_others_none(folders: dict[str, Path]) -> None:
    told = ours(folders["flux"], guidance=2.5).encode(PROMPTS).guidance
    assert told is not None
    assert told.tolist() == [2.5, 2.5]
    family = ours(folders["flux"], guidance=2.5)
    family.config["guidance_embeds"] = False  # FLUX.1-schnell
    assert family.encode(PROMPTS).guidance is None
    assert ours(folders["qwen_image"]).encode(PROMPTS).guidance is None


def test_qwen_masks_padding_and_nothing_else(folders: dict[str, Path]) -> None:
    family = ours(folders["qwen_image"])
    cond = family.encode(PROMPTS)
    assert cond.mask is not None
    assert cond.mask.sum(1).tolist() == [len(family.pipe.tokenizer(p).input_ids) + 5 for p in PROMPTS]
    assert family.encode(PROMPTS[:1]).mask is None
