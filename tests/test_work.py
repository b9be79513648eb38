"""FLOPs of a step: a transformer counted by hand, and whole steps as torch's own counter sees them on real tensors."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_models import FAMILIES as FLOW
from flow_models import save_flow
from measured import counted_step

from train_t2i.cli import parse
from train_t2i.config import Config
from train_t2i.plan.floor import CARDS, Floor, card_of, floor, least_seconds
from train_t2i.plan.ledger import like_a_gpu
from train_t2i.plan.model import empty_family, published_of
from train_t2i.plan.page import told_floor
from train_t2i.plan.rehearsal import ModuleBytes, Peak, Rehearsal, Simulation, rehearse, simulation
from train_t2i.plan.work import Call, Counter, Work

EXACT = {"gradient_share": 1.0, "gathered": False}


def planned(arguments: str) -> tuple[Any, Any]:
    settings = parse(shlex.split(arguments))
    _, published = published_of(settings.run, None)
    return replace(settings, run=replace(settings.run, model_family=published.family)), published


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sdxl_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {"sdxl": sdxl_folder} | {name: save_flow(root / name, name) for name in FLOW}


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_a_qwen_image_call_counted_by_hand(folders: dict[str, Path]) -> None:
    """Two blocks of width d on n image and m text tokens; multiply-adds, forward, and the backward of full training."""
    folder, rows, text = folders["qwen_image"], 3, 24
    settings, published = planned(f"--pretrained-model {folder} --resolution 64 --text-length {text}")
    found = empty_family(published, settings.run, torch.float32)
    family, net = found.family, found.family.load(torch.float32)
    d, (n, m) = 32, ((64 // 8 // 2) ** 2, text)
    assert net.config.num_attention_heads * net.config.attention_head_dim == d
    told = published.denoiser["joint_attention_dim"]
    # queries, keys, values, output, and a feed-forward of four times the width: of both streams; 6 modulations each
    block = (n + m) * (4 + 8) * d * d + 2 * 6 * d * d
    attention = 2 * (n + m) ** 2 * d  # scores, and their sum over values
    ends = n * 64 * d * 2 + m * told * d  # tokens in and out; text in
    time = 256 * d + d * d + d * 2 * d  # two layers of the embedding; the last norm's modulation
    forward = 2 * rows * (2 * (block + attention) + ends + time)
    x, t = torch.empty(rows, 16, 8, 8, device="meta"), torch.empty(rows, device="meta")
    with like_a_gpu(), Counter(family, {"base": net}) as counter:
        with torch.no_grad():
            family.call(net, x, t, family.encode(["a prompt"] * rows))
        assert counter.take() == Work(network=forward, calls=(Call("base", False, rows),))
        net.requires_grad_(True)
        out = family.call(net, x, t, family.encode(["a prompt"] * rows))
        assert counter.take() == Work(network=forward, calls=(Call("base", True, rows),))
        torch.autograd.backward(out.square().mean())
        # twice the forward pass, but for the gradients of what comes in (tokens, the time's frequencies; a trained norm is
        # before the text's first layer), and for what the last block makes of its text, which nothing reads: its output
        # layer and feed-forward
        entering = 2 * rows * (n * 64 * d + 256 * d)
        unread = 2 * rows * m * (1 + 8) * d * d
        assert counter.take() == Work(network=2 * forward - entering - 2 * unread)


def test_what_is_no_network_call_is_told_apart() -> None:
    """A decoder after the call, forward and backward; checkpointing's second time; attention from shapes alone."""
    with torch.device("meta"):
        net, decoder = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    class Family:
        @staticmethod
        def call(net: Any, x: Any, t: Any, cond: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

    family: Any = Family()
    x = torch.empty(5, 8, device="meta")
    with Counter(family, {"net": net}) as counter:
        decoded = decoder(family.call(net, x, None, None))
        forward = counter.take()
        torch.autograd.backward(decoded.sum())
        backward = counter.take()
    one, two = 2 * 5 * 8 * 16, 2 * 5 * 16 * 4
    assert forward == Work(network=one, rest=two, calls=(Call("net", True, 5),))
    assert backward.rest == 2 * two
    assert (backward.network, backward.again) == (one, 0)  # a bare layer needs its input alone: nothing is made again
    query, key, value = (torch.empty(2, 3, n, 16, device="meta", requires_grad=True) for n in (10, 7, 7))
    with like_a_gpu(), Counter(family, {}) as counter:
        out = F.scaled_dot_product_attention(query, key.detach(), value)
        assert counter.take().rest == 2 * 2 * 2 * 3 * 10 * 7 * 16
        torch.autograd.backward(out.sum())
        assert counter.take().rest == 3 * 2 * 2 * 3 * 10 * 7 * 16  # values, scores and queries; not keys
    assert family.call is Family.call


# -- whole steps -----------------------------------------------------------------------------------------------------

ROWS = {
    "full": "--lora-rank 4",
    "adapters": "--use-lora-gen --lora-rank 4 --gradient-checkpointing",
    "all levels": "--use-lora-gen --lora-rank 4 --sample-num-steps 2 --sample-type ode --reward-batch-size 1",
    "reused": "--use-lora-gen --lora-rank 4 --reuse-rollout",
    "sft": "--method sft",
    "direct": "--method direct --use-lora-gen --lora-rank 4 --sample-num-steps 3 --step-checkpointing",
}


@pytest.mark.parametrize(
    ("name", "row"),
    [("sdxl", row) for row in ROWS]
    + [(name, "adapters") for name in FLOW]
    + [("qwen_image", "full"), ("flux", "direct")],
)
def test_a_planned_step_computes_what_a_real_one_does(
    name: str, row: str, folders: dict[str, Path], towers: dict[str, Path], tiny_vae_folder: Path
) -> None:
    """Every product, convolution and attention of all ticks of a step, decoder and both rewards too: equal."""
    own = f"--tiny-vae {tiny_vae_folder}" if name == "sdxl" else "--text-length 24"
    rewards = (
        f"--clip-reward-model {towers['clip']} --hpsv2-reward-model {towers['hpsv2']} --cold-start-iter 0 --cfg-r 3"
    )
    more = ROWS[row] if "--method" in ROWS[row] else f"{own} --ratio-update 3 {rewards} {ROWS[row]}"
    settings, published = planned(
        f"--pretrained-model {folders[name]} --resolution 64 --batch-size 2 --mixed-precision no {more}"
    )
    least = floor(settings.run, rehearse(settings, published, **EXACT), 1)
    assert least.flops + least.again == counted_step(settings)
    assert (least.again > 0) == ("checkpointing" in more)


# -- sums ------------------------------------------------------------------------------------------------------------

MADE = Rehearsal(
    modules={"base": ModuleBytes(4000, 0, 2000, 0, 0), "gen": ModuleBytes(0, 0, 2000, 0, 0)},
    trained={"generator": 2000, "guidance": 100}, encoder_bytes=0, vae_bytes=0, reward_bytes=0,
    rollout=Peak(), updates={}, sheet=Peak(),
    work={
        "rollout": Work(network=40, calls=(Call("gen", False, 4),)),
        "guidance": Work(network=120, calls=(Call("base", True, 4),)),
        "generator": Work(network=320, rest=50, again=9, calls=(Call("gen", True, 4), Call("base", False, 8))),
    },
    times={"rollout": 5, "guidance": 5, "generator": 1}, simulation=Simulation(mean=5 * 2.5, all=20),
)  # fmt: skip
RUN = Config(batch_size=4, sample_num_steps=4, mixed_precision="bf16", gradient_accumulation_steps=2)


def test_a_step_is_its_ticks_with_levels_drawn_evenly() -> None:
    least = floor(RUN, MADE, 1)
    assert least.network == {"rollout": 5 * 2 * 100, "guidance": 5 * 2 * 120, "generator": 2 * 320}
    assert (least.rest, least.again) == (2 * 50, 2 * 9)
    # bf16: 4000 bytes a call; forward and backward of what builds a graph
    assert least.read == 2 * (5 * 2.5 * 4000 + 5 * 2 * 4000 + 2 * 4000 + 4000)
    assert least.updated == (16 + 16) * (5 * 100 + 2000)
    assert floor(replace(RUN, use_8bit_adam=True), MADE, 1).updated == (16 + 2 * (2 + 8 / 256)) * 2500
    assert floor(replace(RUN, backend="fsdp2"), MADE, 8).updated == least.updated / 8
    waits = floor(replace(RUN, offload_optimizer=True), MADE, 1)  # moments come and leave
    assert (least.bus, waits.bus) == (0, 2 * 8 * 2500)
    assert waits.updated == least.updated + waits.bus


def test_how_many_calls_simulations_make() -> None:
    """docs/performance.md: R (N + 1) / 2 calls a row; the whole grid along the ODE; one less where the last is reused."""
    told = "--sample-num-steps 4 --ratio-update 5"
    assert simulation(parse(told.split())) == Simulation(5 * 2.5, 20)
    assert simulation(parse([*told.split(), "--reuse-rollout"])) == Simulation(5 * 2.5 - 1, 19)
    assert simulation(parse([*told.split(), "--sample-type", "ode"])) == Simulation(20, 20)
    assert simulation(parse(["--method", "sft"])) is None


def test_the_least_time_is_of_what_takes_longer() -> None:
    card = CARDS["H100"]
    assert card_of("NVIDIA H100 80GB HBM3") == card
    assert card_of("NVIDIA H100 PCIe") == CARDS["H100 PCIe"]
    assert card_of("NVIDIA A100-SXM4-80GB") == CARDS["A100"]
    assert card_of("an unknown device") is None
    assert least_seconds(Floor({"rollout": 989e12}, 989e12, 5e12, 1e12, 1e12), card) == 2
    assert least_seconds(Floor({"rollout": 989e12}, 0, 0, 6e12, 7e11), card) == pytest.approx(2)


def test_a_page_tells_the_floor() -> None:
    least = Floor({"rollout": 2e12, "guidance": 3e12, "generator": 0}, 1e12, 5e11, 2e9, 3e9)
    told = told_floor(RUN, least)
    assert told[1].split() == ["5", "network", "calls:", "rollout", "2,", "guidance", "update", "3"]
    assert [line.split()[0] for line in told[2:7]] == ["1", "0.5", "and", "2.00", "3.00"]
    assert "H100 0.00607" in told[-1]
    assert "for --offload-optimizer, 7.00 GB between the host's memory" in told_floor(RUN, replace(least, bus=7e9))[-2]
    assert len(told_floor(replace(RUN, mixed_precision="no"), replace(least, rest=0, again=0))) == 5
