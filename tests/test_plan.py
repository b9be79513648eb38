"""The plan: the published models on the meta device, a ledger against what is really allocated, the shares of backends."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_models import save_flow
from measured import measured_tick, peak_bytes
from torch import nn

from train_t2i.__main__ import main
from train_t2i.base_quant import BLOCK, CODE_BYTES, SCALE_BYTES, quantized_layers
from train_t2i.cli import parse
from train_t2i.config import BASE_QUANTS, FAMILY_NAMES, METHOD_NAMES, Config, Settings
from train_t2i.errors import EXIT_DONE, EXIT_USER, UserError
from train_t2i.families import load_family
from train_t2i.families.published import FIRST_OF, PUBLISHED
from train_t2i.plan import MODELS, ledger, parse_plan, rehearsed
from train_t2i.plan import main as plan_main
from train_t2i.plan.estimate import CONTEXT_BYTES, FRAGMENTATION, GB, NETWORK_BYTES, Lever, estimate, levers
from train_t2i.plan.ledger import Ledger, Peak, like_a_gpu
from train_t2i.plan.model import count_encoder, empty_family, published_of
from train_t2i.plan.page import STATED, page, told_levers
from train_t2i.plan.rehearsal import ModuleBytes, Rehearsal, empty_networks, rehearse

FAMILIES = ("sdxl", "sd3", "flux", "qwen_image")
EXACT = {"gradient_share": 1.0, "gathered": False}


def planned(arguments: str) -> tuple[Settings, Any]:
    settings = parse(shlex.split(arguments))
    _, published = published_of(settings.run, None)
    return replace(settings, run=replace(settings.run, model_family=published.family)), published


# -- the published models --------------------------------------------------------------------------------------------

# parameters; blocks by class; LoRA elements at rank 1: the sum of (in + out) over the targets, worked out by hand
#   SD3: (8 L - 2) layers of width W to W (nothing reads the last block's text), SD3.5-medium 13 x 4 more
#   FLUX.1: 19 x (8 x 6144 + 4 x 15360) + 38 x (3 x 6144 + 15360 + 18432)
#   Qwen-Image: 60 x (8 x 6144 + 4 x 15360) - (2 x 6144 + 2 x 15360)
KNOWN: dict[str, tuple[int, dict[str, int], int]] = {
    "sdxl": (2_567_463_684, {"BasicTransformerBlock": 70, "ResnetBlock2D": 17}, 3_074_240),
    "sd3_medium": (2_028_328_000, {"JointTransformerBlock": 24}, (8 * 24 - 2) * 2 * 1536),
    "sd35_medium": (2_243_171_520, {"JointTransformerBlock": 24}, (8 * 24 - 2 + 13 * 4) * 2 * 1536),
    "sd35_large": (8_056_627_520, {"JointTransformerBlock": 38}, (8 * 38 - 2) * 2 * 2432),
    "flux_dev": (11_901_408_320, {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38}, 4_085_760),
    **dict.fromkeys(
        ("qwen_image", "qwen_image_edit", "qwen_image_edit_2509", "qwen_image_edit_2511"),
        (20_430_401_088, {"QwenImageTransformerBlock": 60}, 6_592_512),
    ),
}
ENCODERS = {  # CLIP-L bare and projected, CLIP-G, T5-XXL's encoder, Qwen2.5-VL-7B
    "sdxl": [123_060_480, 694_659_840],
    "sd3_medium": [123_650_304, 694_659_840, 4_762_310_656],
    "flux_dev": [123_060_480, 4_762_310_656],
    "qwen_image": [8_292_166_656],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_published_sizes(name: str) -> None:
    """Through the trainer's own building: layout shared, adapters of rank 1 and 2, gradient checkpointing."""
    found = PUBLISHED[name]
    count, blocks, lora = KNOWN[name]
    run = Config(model_family=found.family, lora_rank=1, use_lora_gen=True, gradient_checkpointing=True)
    family = empty_family(found, run, torch.bfloat16).family
    networks = empty_networks(Settings(run, parse(["--use-lora-gen"]).method), family, torch.bfloat16, torch.no_grad)
    base = networks.modules["base"]
    trained = {role: sum(p.numel() for p in networks.parameters(role)) for role in networks.trains}
    assert trained == {"generator": 2 * lora, "guidance": lora}
    assert sum(p.numel() for p in base.parameters()) - 3 * lora == count
    classes = [type(module).__name__ for module in base.modules()]
    assert {block: classes.count(block) for block in family.block_names} == blocks
    assert all(p.is_meta for p in base.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_the_published_text_encoders_have_their_sizes(name: str) -> None:
    assert [count_encoder(*encoder) for encoder in PUBLISHED[name].encoders] == ENCODERS[name]


def test_every_published_model_can_be_named() -> None:
    assert tuple(PUBLISHED) == MODELS
    assert {name: PUBLISHED[first].family for name, first in FIRST_OF.items()} == {name: name for name in FAMILY_NAMES}


def test_sources_take_memory_as_tokens() -> None:
    """A source of the target's own size doubles the image tokens, and the activations by about as much."""

    def activations(flags: str) -> int:
        config, settings = parse_plan(
            f"--resolution 512 --source-size 512 --use-lora-gen --batch-size 1 {flags}".split()
        )
        _, published = published_of(settings.run, config.model)
        run = replace(settings.run, model_family=published.family)
        published = replace(published, num_sources=config.num_sources)
        return max(peak.activations for peak in rehearsed(replace(settings, run=run), published, 1).updates.values())

    alone, one, two = (activations(f"--model qwen_image_edit_2509 --num-sources {n} --cfg-r 1") for n in (0, 1, 2))
    # 1024 noisy tokens, 512 of text; a source adds 1024, and 196 that the encoder saw
    assert one / alone == pytest.approx((1024 + 512 + 1024 + 196) / (1024 + 512), rel=0.1)
    assert two - one == pytest.approx(one - alone, rel=0.02)
    config, settings = parse_plan(
        ["--model", "qwen_image_edit_2509", "--resolution", "64", "--source-size", "64", "--use-lora-gen"]
    )
    run = replace(settings.run, model_family="qwen_image_edit_plus")
    found = rehearsed(replace(settings, run=run), PUBLISHED[str(config.model)], 1)
    assert not any("--prompt-cache" in lever.what for lever in levers(run, found, 1)), "texts are read beside sources"
    for flags, told in (
        ("--model qwen_image --num-sources 2", "--num-sources does nothing for qwen_image"),
        ("--model qwen_image_edit --num-sources 2", "--num-sources 2: qwen_image_edit takes 1 to 1"),
    ):
        with pytest.raises(UserError, match=told):
            plan_main(flags.split())


def test_which_model_is_meant(sdxl_folder: Path) -> None:
    large = "stabilityai/stable-diffusion-3.5-large"
    assert published_of(Config(), None)[0] == "sdxl"
    assert published_of(Config(pretrained_model=large), None)[0] == "sd35_large"
    assert published_of(Config(model_family="qwen_image"), None)[0] == "qwen_image"
    assert published_of(Config(model_family="sd3"), "sd35_medium")[0] == "sd35_medium"
    assert published_of(Config(pretrained_model=str(sdxl_folder)), None)[1].denoiser["cross_attention_dim"] == 40
    with pytest.raises(UserError, match="its sizes are not known here"):
        published_of(Config(pretrained_model="someone/finetune"), None)
    with pytest.raises(UserError, match="its sizes are not known here"):
        published_of(Config(pretrained_model="someone/finetune", model_family="flux"), None)
    with pytest.raises(UserError, match="--model flux_dev is of the family flux"):
        published_of(Config(model_family="sd3"), "flux_dev")


# -- the ledger ------------------------------------------------------------------------------------------------------


def test_what_is_alive_is_counted_once() -> None:
    """Views and what was there before are not; what is freed is not any more."""
    before = torch.zeros(1000)
    with Ledger() as counted:
        first = before + 1
        view = first.view(10, 100)[2:].t()
        before.t()
        assert counted.live_bytes == 4000
        second = torch.cat([first, first])
        assert counted.live_bytes == 12000
        del first
        assert counted.live_bytes == 12000
        del view
        assert counted.live_bytes == 8000
        del second
    assert (counted.live_bytes, counted.peak) == (0, Peak(12000))


@pytest.mark.parametrize(("share", "held"), [(1.0, False), (0.25, False), (1.0, True), (0.25, True)])
def test_gradients_are_told_apart(share: float, held: bool) -> None:
    weight = nn.Parameter(torch.zeros(1000))
    with Ledger([weight], share, held=held) as counted:
        assert counted.gradient_bytes == (4000 * share if held else 0)
        torch.autograd.backward((weight * 2).sum())
        assert counted.gradient_bytes == counted.live_bytes == 4000 * share
    weight.grad = None
    assert counted.gradient_bytes == counted.live_bytes == 0
    assert weight._post_accumulate_grad_hooks is None or not weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_attention_keeps_no_matrix_of_pairs() -> None:
    query, key, value = (torch.empty(1, 2, 64, 16, device="meta", requires_grad=True) for _ in range(3))
    with like_a_gpu(), Ledger() as counted:
        out = F.scaled_dot_product_attention(query, key, value)
        assert counted.live_bytes == out.nbytes + 4 * 2 * 64  # and one number a query
        torch.autograd.backward(out.sum())
    assert query.grad is not None
    assert query.grad.shape == query.shape
    real = torch.randn(1, 2, 8, 16)
    usual = F.scaled_dot_product_attention(real, real, real)
    with like_a_gpu():  # tensors with content go the usual way
        assert torch.equal(F.scaled_dot_product_attention(real, real, real), usual)


def test_autocast_on_shapes_is_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the CPU's own, whose fp32 list lacks CUDA's norms: formats of results, copies of weights, peak."""
    monkeypatch.setattr(ledger, "IN_FP32", ())

    def net(device: str) -> nn.Module:
        with torch.device(device):
            return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256))

    def update(made: nn.Module, x: torch.Tensor, autocast: Any) -> None:
        with autocast(torch.bfloat16):
            out = made(x)
        torch.autograd.backward(out.float().square().mean())

    real, shapes = net("cpu"), net("meta")
    x = torch.randn(64, 256)
    measured = peak_bytes(lambda: update(real, x, lambda dtype: torch.autocast("cpu", dtype=dtype)))
    with like_a_gpu() as autocast, Ledger() as counted:
        update(shapes, x.to("meta"), autocast)
    assert counted.peak.total == pytest.approx(measured, rel=0.05)
    with like_a_gpu() as autocast, autocast(torch.bfloat16):
        assert shapes(x.to("meta")).dtype == torch.bfloat16


def test_norms_are_fp32_as_on_cuda() -> None:
    with like_a_gpu() as autocast, torch.device("meta"):
        low = torch.empty(2, 8, dtype=torch.bfloat16)
        with autocast(torch.bfloat16):
            assert F.layer_norm(low, (8,)).dtype == low.softmax(-1).dtype == torch.float32
            assert F.linear(torch.empty(2, 8), torch.empty(3, 8)).dtype == torch.bfloat16
        assert F.layer_norm(low, (8,)).dtype == torch.bfloat16
    names = [(owner, name, getattr(owner, name)) for owner, name in (*ledger.IN_FP32, *ledger.IN_LOW_PRECISION)]
    with like_a_gpu():
        pass
    assert all(getattr(owner, name) is function for owner, name, function in names)


# -- a tick: rehearsed against measured ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {"sdxl": sdxl_folder} | {name: save_flow(root / name, name) for name in FAMILIES[1:]}


ROWS = {"plain": "", "adapters": "--use-lora-gen --gradient-checkpointing"}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rehearsed_tick_takes_what_a_real_one_does(
    name: str, row: str, folders: dict[str, Path], towers: dict[str, Path], tiny_vae_folder: Path
) -> None:
    """Whole updates with both rewards, fp32, against the allocations that torch's profiler saw: within a tenth.

    SDXL within a quarter: a processor's convolutions have workspaces of their own, which differ between processors.
    """
    own = f"--resolution 128 --tiny-vae {tiny_vae_folder}" if name == "sdxl" else "--resolution 64 --text-length 24"
    settings, published = planned(
        f"--pretrained-model {folders[name]} {own} --batch-size 2 --mixed-precision no --lora-rank 4 --cfg-r 3 "
        f"--sample-num-steps 2 --cold-start-iter 0 --clip-reward-model {towers['clip']} "
        f"--hpsv2-reward-model {towers['hpsv2']} {ROWS[row]}"
    )
    found, measured = rehearse(settings, published, **EXACT), measured_tick(settings)
    off = 0.25 if name == "sdxl" else 0.1
    for role, peak in found.updates.items():
        assert peak.total == pytest.approx(measured[role], rel=off), role
    assert found.sheet.total == pytest.approx(measured["sheet"], rel=0.05)
    assert (1 - off) * measured["rollout"] < found.rollout.total < 1.5 * measured["rollout"]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_can_be_rehearsed(method: str, folders: dict[str, Path]) -> None:
    own = f"{folders['sdxl']}"
    if method == "arcflow":
        own = f"{folders['flux']} --text-length 24 --use-lora-gen --lora-rank 4 --sample-num-steps 2"
    settings, published = planned(f"--method {method} --resolution 64 --batch-size 1 --pretrained-model {own}")
    found = rehearse(settings, published, **EXACT)
    assert all(peak.total > 0 for peak in found.updates.values())
    assert found.updates.keys() == found.trained.keys()
    assert found.averaged == (found.trained["generator"] if method == "arcflow" else 0)


def test_what_moves_a_rehearsal(folders: dict[str, Path], tmp_path: Path) -> None:
    """Checkpointing, rows, accumulation, sharding, files that are not here yet: each shows."""
    flags = (
        f"--pretrained-model {folders['sdxl']} --resolution 128 --batch-size 2 --mixed-precision bf16 --use-lora-gen"
    )

    def found(more: str = "", **shared: Any) -> Rehearsal:
        return rehearse(*planned(f"{flags} {more}"), **{**EXACT, **shared})

    plain = found()
    update = plain.updates["generator"]
    assert found("--gradient-checkpointing").updates["generator"].total < 0.6 * update.total
    assert found("--batch-size 4").updates["generator"].activations > 1.6 * update.activations
    whole = 4 * plain.trained["generator"]
    assert found("--gradient-accumulation-steps 2").updates["generator"].gradients == whole
    assert found("--gradient-accumulation-steps 2", gradient_share=0.5).updates["generator"].gradients == whole / 2
    rewarded = found(f"--cold-start-iter 0 --clip-reward-model {tmp_path}/not-here.bin")
    assert rewarded.reward_bytes > 1.9e9  # ViT-H-14 in half precision
    assert rewarded.updates["generator"].total > 1.5 * update.total
    sharded = found("--layout paired --use-lora-gen off --gradient-checkpointing", gathered=True)
    copied = found("--layout paired --use-lora-gen off --gradient-checkpointing")
    assert copied.updates["generator"].total - sharded.updates["generator"].total > 0
    mean = found("--method sft --ema-decay 0.99")
    assert mean.averaged == mean.trained["generator"] > 0


def test_quantised_weights_are_rehearsed_as_codes(sdxl_folder: Path) -> None:
    """Every kind; the tables of two are read while they are made, on a device without content."""
    pytest.importorskip("bitsandbytes")
    family = load_family("sdxl", str(sdxl_folder))
    layers = len(quantized_layers(family.load(torch.float32), family.block_names))
    flags = (
        f"--method sft --pretrained-model {sdxl_folder} --resolution 64 --batch-size 1 --mixed-precision bf16 "
        "--use-lora-gen"
    )
    # transformers replaces linspace while it loads; torch lists once, at any time, what makes tensors on the device
    torch.utils._device._device_constructors.cache_clear()
    base = rehearse(*planned(flags), **EXACT).modules["base"]
    for kind in BASE_QUANTS:
        codes = rehearse(*planned(f"{flags} --base-quant {kind}"), **EXACT).modules["base"]
        assert codes.num_quantizable == 0
        small = (2 - CODE_BYTES[kind] - SCALE_BYTES / BLOCK[kind]) * base.num_quantizable
        tables = 4 * (16 if kind == "nf4" else 256) * layers
        assert base.frozen_bytes - codes.frozen_bytes == pytest.approx(small - tables, rel=0.02), kind


# -- shares of backends ----------------------------------------------------------------------------------------------

MADE = Rehearsal(
    modules={"base": ModuleBytes(4 * GB, 2 * GB, 2 * GB, GB // 10, GB // 5)},
    trained={"generator": 200_000_000, "guidance": 100_000_000},
    encoder_bytes=3 * GB, vae_bytes=GB // 2, reward_bytes=GB,
    rollout=Peak(GB), updates={"guidance": Peak(2 * GB), "generator": Peak(4 * GB, GB)}, sheet=Peak(GB),
)  # fmt: skip
PAIR = Config(layout="shared", use_lora_gen=True, mixed_precision="bf16")


@pytest.mark.parametrize(
    ("backend", "world", "frozen", "trained", "optimizer", "gathered"),
    [
        ("ddp", 1, 4.0, 1.2, 2.4, 0.0), ("ddp", 8, 4.0, 1.2, 2.4, 0.0), ("zero2", 8, 4.0, 1.35, 0.3, 4.0),
        ("fsdp2", 8, 0.5, 0.15, 0.3, 0.4), ("zero3", 8, 0.5, 0.15, 0.3, 0.8 + 4.0), ("fsdp2", 1, 4.0, 1.2, 2.4, 0.0),
    ],
)  # fmt: skip
def test_what_a_backend_shares(
    backend: str, world: int, frozen: float, trained: float, optimizer: float, gathered: float
) -> None:
    """docs/memory.md's formulae: two fp32 moments, fp32 masters, DeepSpeed's own fp32 parts and buckets."""
    plan = estimate(replace(PAIR, backend=backend), MADE, world)
    assert plan.frozen == pytest.approx(frozen * GB)
    assert plan.trained == pytest.approx(trained * GB)
    assert plan.optimizer == pytest.approx(optimizer * GB)
    assert plan.gathered == pytest.approx(gathered * GB)
    assert (plan.encoders, plan.vae, plan.rewards) == (3 * GB, GB // 2, GB)
    assert plan.worst == "generator update"
    assert estimate(replace(PAIR, backend=backend, prompt_cache="folder"), MADE, world).encoders == 0
    network = NETWORK_BYTES if world > 1 else 0
    assert plan.reserve == pytest.approx(CONTEXT_BYTES + network + FRAGMENTATION * 4 * GB)
    assert plan.total == plan.kept + plan.gathered + 4 * GB + plan.reserve


@pytest.mark.parametrize(("backend", "share"), [("ddp", 1.0), ("fsdp2", 0.125), ("zero2", 0.125), ("zero3", 0.125)])
def test_a_moving_average_lies_where_the_moments_do(backend: str, share: float) -> None:
    run, kept = replace(PAIR, backend=backend), replace(MADE, averaged=MADE.trained["generator"])
    plain, with_it = estimate(run, MADE, 8), estimate(run, kept, 8)
    assert with_it.optimizer - plain.optimizer == pytest.approx(0.8 * GB * share)
    assert with_it.total - plain.total == with_it.optimizer - plain.optimizer
    rank = next(lever.plan for lever in levers(run, kept, 8) if "--lora-rank" in lever.what)
    assert rank.optimizer == pytest.approx(with_it.optimizer / 2)


def test_what_is_the_worst_moment() -> None:
    """With several processes on ddp the gradients and their flat copy may be; 8-bit state; cards."""
    grown = replace(MADE, trained={"generator": 2 * GB, "guidance": 0})
    plan = estimate(replace(PAIR, backend="ddp", use_8bit_adam=True), grown, 2)
    assert plan.worst == "generator gradient exchange"
    assert plan.phases[plan.worst] == (16 * GB, 0)
    assert plan.optimizer == pytest.approx((2 + 8 / 256) * 2 * GB)
    assert "generator gradient exchange" not in estimate(replace(PAIR, backend="ddp"), grown, 1).phases
    assert plan.cards == (48, 80, 141)
    assert replace(plan, frozen=plan.frozen + 48 * GB - plan.total).cards == (48, 80, 141)
    assert replace(plan, frozen=plan.frozen + 48 * GB - plan.total + 1).cards == (80, 141)


def test_moments_that_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave what is kept; a slice of them comes to the gradients, which all are there by then."""
    monkeypatch.setattr("train_t2i.plan.estimate.SLICE", 50_000_000)
    plain = replace(PAIR, backend="ddp")
    for world, run in ((1, plain), (8, replace(plain, backend="fsdp2")), (2, replace(plain, use_8bit_adam=True))):
        kept, waits = (estimate(replace(run, offload_optimizer=on), MADE, world) for on in (False, True))
        assert (kept.host, waits.optimizer) == ({}, 0)
        assert waits.host == {"optimizer": kept.optimizer}
        assert kept.optimizer > 0
        assert kept.total - waits.total == kept.optimizer  # activations are the worst moment
        share, moment = 1 if run.backend == "ddp" else world, (2 + 8 / 256) if run.use_8bit_adam else 8
        slices = {role: min(count / share, 50_000_000) for role, count in MADE.trained.items()}
        steps = {f"{r} step": (int(4 * n / share), int(moment * slices[r])) for r, n in MADE.trained.items()}
        assert {name: phase for name, phase in waits.phases.items() if name not in kept.phases} == steps
    small = replace(MADE, updates={role: Peak() for role in MADE.updates}, rollout=Peak(), sheet=Peak())
    alone = estimate(replace(plain, offload_optimizer=True), small, 1)
    assert alone.phases[alone.worst] == (800_000_000, 400_000_000)
    told = page("sd3_medium", plain, "shared", 1, small, alone)
    assert [line.strip() for line in told if "step" in line or "host" in line] == [
        "0.80  gradients, generator step", "0.40  moments, generator step", "guidance step: 0.80",
        "2.40  of the host's memory, pinned: optimizer",
    ]  # fmt: skip


def test_levers_say_what_they_come_to() -> None:
    run = replace(PAIR, backend="ddp", batch_size=4)
    now = estimate(run, MADE, 8)
    told = {lever.what: lever.plan for lever in levers(run, MADE, 8)}
    assert now.total - told["--prompt-cache (no text encoder is loaded)"].total == 3 * GB
    assert now.total - told["--use-8bit-adam"].total == pytest.approx((6 - 8 / 256) * 0.3 * GB)
    waits = told["--offload-optimizer (2.40 GB of the host's memory)"]
    assert now.total - waits.total == pytest.approx(8 * 0.3 * GB)
    grown = replace(MADE, trained={"generator": 2 * GB, "guidance": 0})
    for on in (False, True):
        offered = " ".join(lever.what for lever in levers(replace(run, offload_optimizer=on), grown, 8))
        assert "--backend fsdp2" in offered
        assert ("--backend zero2" in offered, "--offload-optimizer" in offered) == (not on, not on)
    assert not any("offload" in lever.what for lever in levers(replace(run, backend="zero2"), grown, 8))
    assert now.frozen - told["--base-quant nf4"].frozen == pytest.approx((2 - 0.5 - 4 / 64) * 2 * GB)
    assert told["--backend fsdp2"].frozen == GB // 2
    one = told["--batch-size 1 --gradient-accumulation-steps 4"]
    assert one.phases["generator update"] == (800_000_000, 400_000_000 + 2_600_000_000 // 4)
    assert told["--lora-rank 16"].trained == now.trained // 2
    assert all(plan.total < now.total for plan in told.values())
    sharded = {lever.what: lever.plan for lever in levers(replace(run, backend="fsdp2"), MADE, 8)}
    assert sharded["--batch-size 1 --gradient-accumulation-steps 4"].phases["generator update"] == (10**8, 750_000_000)
    quiet = replace(run, base_quant="nf4", use_8bit_adam=True, offload_optimizer=True, batch_size=1, lora_rank=4)
    for world in (1, 8):  # codes are not shared out
        assert [lever.what.split()[0] for lever in levers(quiet, MADE, world)] == ["--prompt-cache"]


def test_a_page_names_the_cards_that_a_lever_gains_and_what_others_state() -> None:
    run = replace(PAIR, backend="ddp")
    plan = estimate(run, MADE, 1)
    assert page("sd3_medium", run, "shared", 1, MADE, plan)[-1] == f"stated elsewhere: {STATED['sd3_medium'][0]}"
    assert page("a/folder", run, "shared", 1, MADE, plan)[-1].startswith("fits on cards of: ")
    large, small = (replace(plan, frozen=plan.frozen + count * GB - plan.total) for count in (50, 40))
    told = told_levers(large, [Lever("--less", small), Lever("--a-little-less", replace(large, vae=0))])
    assert told[0].startswith("what to turn down")
    assert [line.strip() for line in told[1:]] == ["40.00  --less  now on 48 GB", "49.50  --a-little-less"]
    assert told_levers(large, []) == []


# -- the verb --------------------------------------------------------------------------------------------------------


def test_a_plan_is_printed(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    row = f"plan --pretrained-model {folders['qwen_image']} --family qwen_image --layout shared --use-lora-gen "
    more = "--resolution 64 --batch-size 2 --backend ddp --num-processes 8 --mixed-precision bf16 --text-length 24"
    assert main(shlex.split(row + more)) == EXIT_DONE
    said = capsys.readouterr().out
    assert "dmdr, layout shared, 64 px, batch 2, bf16, 8 processes, ddp" in said
    for word in ("frozen weights", "trained weights (fp32)", "optimizer", "text encoders", "gradients, ", "reserve"):
        assert word in said, word
    assert "fits on cards of: 24 GB yes, 48 GB yes, 80 GB yes, 141 GB yes" in said
    assert "what to turn down" in said
    assert "--gradient-checkpointing (counted)" in said


def test_the_shares_of_a_backend_reach_the_rehearsal(sdxl_folder: Path) -> None:
    """Scattered gradients, which accumulation holds, and weights gathered in bf16."""
    settings, published = planned(
        f"--method sft --pretrained-model {sdxl_folder} --resolution 64 --batch-size 1 --mixed-precision bf16 "
        "--gradient-accumulation-steps 2 --backend fsdp2"
    )
    assert rehearsed(settings, published, 8) == rehearse(settings, published, gradient_share=1 / 8, gathered=True)


def test_auto_is_plain_data_parallelism_without_a_launcher() -> None:
    assert parse_plan([])[1].run.backend == "ddp"
    config, settings = parse_plan(
        ["--num_processes=8", "--backend", "zero2", "--family", "flux", "--model", "flux_dev"]
    )
    assert (config.num_processes, config.model) == (8, "flux_dev")
    assert (settings.run.backend, settings.run.model_family) == ("zero2", "flux")


def test_what_cannot_be_planned_is_told_in_one_line(
    folders: dict[str, Path], tiny_vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {
        "--num-processes 0": "--num-processes 0: must be at least 1",
        "--model sd9": "invalid choice: 'sd9'",
        "--nonsense 1": "--nonsense: unknown flag",
        f"--pretrained-model {folders['sd3']} --resolution 1024 --batch-size 1": "at most 128 pixels a side",
        f"--pretrained-model {folders['qwen_image']} --resolution 64 --tiny-vae x --cold-start-iter 0 --clip-reward-model x": "no tiny decoder",
        f"--pretrained-model {folders['sd3']} --resolution 64 --tiny-vae {tiny_vae_folder} --cold-start-iter 0 --clip-reward-model x": "have 4 channels",
        "--base-quant nf4 --backend fsdp2": "does not go with --backend fsdp2",
        "--text-length 32": "--text-length does nothing for sdxl",
        f"--pretrained-model {folders['flux']} --family sd3": "is of the family flux",
    }
    for flags, told in lines.items():
        assert main(["plan", *shlex.split(flags)]) == EXIT_USER, flags
        said = capsys.readouterr().err
        assert told in said
        assert len(said[said.index("error: ") :].splitlines()) <= 2


BROKEN = [  # family, file, what it says (None: nothing), what is told
    ("flux", "transformer/config.json", {"joint_attention_dim": None}, "its denoiser's config says no joint_attention_dim"),
    ("flux", "text_encoder_2/config.json", {"architectures": []}, '/config.json: "architectures" names no model of'),
    ("flux", "text_encoder/config.json", {"architectures": ["CLIPTextMode"]}, '/config.json: "architectures" names no'),
    ("flux", "vae/config.json", {"block_out_channels": []}, "cannot be loaded (IndexError"),
    ("sdxl", "unet/config.json", {"block_out_channels": [16]}, "cannot be loaded (Must provide"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "says", "told"), BROKEN)
def test_a_folder_whose_configs_make_no_sense_is_named(
    name: str,
    file: str,
    says: dict[str, Any],
    told: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / name
    shutil.copytree(folders[name], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = {**json.loads((folder / file).read_text()), **says}
    (folder / file).write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))
    assert main(["plan", "--pretrained-model", str(folder), "--use-lora-gen", "--resolution", "64"]) == EXIT_USER
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(folder) in errors[0]
    assert told in errors[0]
    assert "--resolution" not in "".join(lines)
