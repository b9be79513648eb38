"""Methods: what each update is made of, against the formulae written out; and that no result depends on the batching."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from train_t2i import losses
from train_t2i.config import DirectConfig, DMDRConfig, SFTConfig
from train_t2i.families import Family, load_family
from train_t2i.methods import METHODS, Batch, RewardTerm, Setting
from train_t2i.methods.base import Clock, drop_captions
from train_t2i.networks import Networks
from train_t2i.randomness import Draw

PROMPTS = ["a red circle", "a blue square", "two green stars", "nothing"]
SHAPE = (4, 4, 4)
CPU = torch.device("cpu")
LATER = Clock(tick=9, step=2)
FADING = {"s_type_gui": "beta", "gui_a": 9.0, "gui_b": 1.5, "dynamic_step": 4}  # half-way there at LATER


@pytest.fixture(scope="module")
def family(sdxl_folder, tiny_vae_folder) -> Family:
    return load_family("auto", str(sdxl_folder), tiny_vae=str(tiny_vae_folder))


@pytest.fixture(scope="module")
def networks(family) -> Networks:
    networks = tiny.networks(family, "shared")
    tiny.shake(networks.modules["base"])
    return networks


def method(kind: str, networks: Networks, config, num_steps: int = 1, rewards=()):
    grid = networks.family.path.grid(num_steps)
    return METHODS[kind](config, Setting(networks, networks.family, grid, SHAPE, 4, CPU, tuple(rewards)))


def dmdr(networks: Networks, num_steps: int = 1, rewards=(), **settings):
    return method("dmdr", networks, DMDRConfig(**{"cfg_r": 3.0, "ratio_update": 2, **settings}), num_steps, rewards)


def batch(rows=range(4), **extra) -> Batch:
    return Batch([10 + row for row in rows], [PROMPTS[row] for row in rows], **extra)


def run_update(
    networks: Networks, algorithm, role: str, rollouts, clock: Clock = LATER
) -> tuple[float, dict, list[Tensor]]:
    """(loss, metrics of the last part, gradients) of one update."""
    parameters, total = networks.parameters(role), 0.0
    metrics: dict[str, Tensor] = {}
    for parameter in parameters:
        parameter.grad = None
    with networks.updating(role):
        for rollout in rollouts:
            for loss, reported in algorithm.losses(role, rollout, clock):
                metrics = reported
                (loss / len(rollouts)).backward()
                total += float(loss.detach()) / len(rollouts)
    return total, metrics, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]


def assert_close(mine: list[Tensor], other: list[Tensor], rtol: float = 1e-3) -> None:
    """As whole vectors: their difference is small beside them."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (mine, other))
    assert b.norm() > 0
    assert float((a - b).norm() / b.norm()) < rtol


def spy(monkeypatch, networks: Networks) -> list[dict]:
    """What the networks are asked for."""
    calls, predict = [], Networks.predict

    def recorded(self, role, x_t, t, cond, *, cfg=1.0, scale=None):
        out = predict(self, role, x_t, t, cond, cfg=cfg, scale=scale)
        calls.append({"role": role, "x_t": x_t, "t": t, "cond": cond, "cfg": cfg, "scale": scale, "out": out.detach()})
        return out

    monkeypatch.setattr(Networks, "predict", recorded)
    return calls


def of_role(calls: list[dict], role: str) -> list[dict]:
    return [call for call in calls if call["role"] == role]


# -- DMDR: the simulated inputs --------------------------------------------------------------------------------------


def test_the_student_starts_from_pure_noise_at_the_top_and_from_its_own_sample_below(networks, family, monkeypatch):
    algorithm = dmdr(networks, num_steps=4)
    monkeypatch.setattr(type(algorithm.level_times), "sample_index", lambda *args: torch.tensor([0, 1, 2, 3]))
    calls = spy(monkeypatch, networks)
    rollout = algorithm.rollout(batch(), LATER)
    assert torch.equal(rollout.t, family.path.grid(4)[:4])
    draw = Draw(4, LATER.tick, batch().indices, CPU)
    fresh = draw.normal("student_input", SHAPE)
    assert torch.equal(rollout.x_t[0], fresh[0])
    below = family.path.add_noise(rollout.x0, fresh, rollout.t)
    assert torch.equal(rollout.x_t[1:], below[1:])
    for row, call in enumerate(of_role(calls, "generator")):  # row b's estimate at its own level: it is asked no more
        assert len(call["x_t"]) == 4 - row
        torch.testing.assert_close(family.path.to_x0(call["x_t"], call["out"], call["t"])[-1], rollout.x0[row])
    assert torch.equal(of_role(calls, "generator")[0]["x_t"], draw.normal("simulation/0", SHAPE).flip(0))
    assert not torch.equal(fresh, draw.normal("simulation/0", SHAPE))


def test_the_levels_drawn_fade_too(networks):
    fading = dmdr(networks, 4, s_type_gen="beta", gen_a=60.0, gen_b=1.0, dynamic_step=4)
    shares = []
    for step in (0, 4):
        clocks = [Clock(tick, step) for tick in range(12)]
        top = sum(int((fading.rollout(batch(), clock).t == fading.setting.grid[0]).sum()) for clock in clocks)
        shares.append(top / 48)
    assert shares[0] > 0.9
    assert shares[1] < 0.4


def test_one_step_is_conditioned_at_399_and_fed_pure_noise(networks, family, monkeypatch):
    algorithm, calls = dmdr(networks), spy(monkeypatch, networks)
    rollout = algorithm.rollout(batch(), LATER)
    run_update(networks, algorithm, "generator", [rollout])
    inputs = of_role(calls, "generator")
    assert len(inputs) == 2
    for call in inputs:
        assert family.path.levels(call["t"]).tolist() == [399] * 4
        assert abs(float(call["x_t"].std()) - 1) < 0.15  # noise of a noised latent would be smaller
    draw = Draw(4, LATER.tick, batch().indices, CPU)
    assert torch.equal(inputs[1]["x_t"], draw.normal("student_input", SHAPE))
    assert all(call["cfg"] == 1.0 for call in inputs)


# -- DMDR: the two losses --------------------------------------------------------------------------------------------


def test_the_guidance_network_denoises_the_students_samples(networks, family, monkeypatch):
    algorithm = dmdr(networks, lora_scale_f=2.0, cfg_f=1.0, **FADING)
    rollout = algorithm.rollout(batch(), LATER)
    calls = spy(monkeypatch, networks)
    loss, metrics, gradients = run_update(networks, algorithm, "guidance", [rollout])
    (call,) = calls
    draw = rollout.draw
    tau, noise = algorithm.score_times.sample(draw, "guidance_time", LATER.step), draw.normal("guidance_noise", SHAPE)
    assert (call["role"], call["scale"], call["cfg"]) == ("guidance", 2.0, 1.0)
    assert torch.equal(call["t"], tau)
    assert torch.equal(call["x_t"], family.path.add_noise(rollout.x0, noise, tau))
    assert loss == pytest.approx(float(((call["out"] - noise) ** 2).mean()), rel=1e-5)
    assert metrics.keys() == {"loss"}
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_generator_follows_the_difference_of_two_scores_at_one_fresh_time(networks, family, monkeypatch):
    algorithm = dmdr(networks, lora_scale_f=2.0, **FADING)
    rollout = algorithm.rollout(batch(), LATER)
    calls = spy(monkeypatch, networks)
    loss, metrics, gradients = run_update(networks, algorithm, "generator", [rollout])
    student, real, fake = calls
    assert [call["role"] for call in calls] == ["generator", "teacher", "guidance"]
    draw, path = rollout.draw, family.path
    x0 = path.to_x0(student["x_t"], student["out"], student["t"])
    tau = algorithm.score_times.sample(draw, "score_time", LATER.step)
    assert torch.equal(real["t"], tau)
    assert torch.equal(fake["t"], tau)
    assert not torch.equal(tau, algorithm.score_times.sample(draw, "guidance_time", LATER.step))
    x_tau = path.add_noise(x0, draw.normal("score_noise", SHAPE), tau)
    torch.testing.assert_close(real["x_t"], x_tau)
    assert torch.equal(real["x_t"], fake["x_t"])
    estimates = [path.to_x0(call["x_t"], call["out"], call["t"]) for call in (real, fake)]
    direction = losses.dmd_direction(x0, *estimates)
    assert loss == pytest.approx(float(0.5 * (direction**2).mean()), rel=1e-4)
    assert metrics.keys() == {"loss", "loss_dmd", "score_gap"}
    assert float(metrics["score_gap"]) == pytest.approx(float((estimates[1] - estimates[0]).abs().mean()), rel=1e-4)
    # the gradient is direction / numel pushed through the student alone
    for parameter in networks.parameters("generator"):
        parameter.grad = None
    with networks.updating("generator"):
        again = networks.x0("generator", rollout.x_t, rollout.t, rollout.cond)
        again.backward(direction / direction.numel())
    assert_close(gradients, [p.grad for p in networks.parameters("generator")], rtol=1e-4)


def test_guidance_weights_are_drawn_a_row_within_half_of_the_setting(networks, monkeypatch):
    algorithm, calls = dmdr(networks, cfg_r=7.0, cfg_f=2.0), spy(monkeypatch, networks)
    rollout = algorithm.rollout(batch(), LATER)
    run_update(networks, algorithm, "generator", [rollout])
    run_update(networks, algorithm, "guidance", [rollout])
    for role, cfg in (("teacher", 7.0), ("guidance", 2.0)):
        drawn = of_role(calls, role)[0]["cfg"]
        assert drawn.shape == (4,)
        assert len(set(drawn.tolist())) == 4
        assert ((drawn - cfg).abs() <= 0.5).all()
    assert of_role(calls, "guidance")[-1]["cfg"] == 1.0  # its own training is never guided


def test_without_guidance_no_negative_is_encoded(networks, monkeypatch):
    algorithm, calls = dmdr(networks, cfg_r=1.0), spy(monkeypatch, networks)
    rollout = algorithm.rollout(batch(), LATER)
    run_update(networks, algorithm, "generator", [rollout])
    assert rollout.cond.negative is None
    assert all(isinstance(call["cfg"], float) and call["cfg"] == 1.0 for call in calls)


def test_the_negative_prompt_is_encoded(networks, family):
    rollout = dmdr(networks, negative_prompt="blurred").rollout(batch(), LATER)
    assert torch.equal(rollout.cond.negative.tokens, family.encode(batch().prompts, "blurred").negative.tokens)


@pytest.mark.parametrize(("step", "scale"), [(0, 0.5), (5, 0.25), (10, 0.0), (99, 0.0)])
def test_the_teacher_borrows_the_guidance_adapter_ever_less(networks, monkeypatch, step, scale):
    algorithm, calls = dmdr(networks, num_steps=4, lora_scale_r=0.5, dynamic_step=10), spy(monkeypatch, networks)
    clock = Clock(tick=2 * step + 1, step=step, tick_in_step=1)
    run_update(networks, algorithm, "generator", [algorithm.rollout(batch(), clock)], clock)
    assert of_role(calls, "teacher")[0]["scale"] == pytest.approx(scale)
    assert of_role(calls, "guidance")[0]["scale"] == 2.0
    assert dmdr(networks, lora_scale_r=0.5, dynamic_step=0).borrowed_scale(step) == 0  # as published: D = 0 is off


def test_times_of_the_scores_fade_to_uniform(networks):
    algorithm = dmdr(networks, num_steps=4, s_type_gui="beta", gui_a=4.0, gui_b=1.5, dynamic_step=10)
    assert algorithm.score_times.beta_at(0) == (4.0, 1.5)
    assert algorithm.score_times.beta_at(10) == (1.0, 1.0)
    assert (algorithm.score_times.low, algorithm.score_times.high) == (0.02, 0.98)
    other = dmdr(networks, num_steps=4, s_type_gen="beta", gen_a=2.0, gen_b=3.0, dynamic_step=10)
    assert other.level_times.beta_at(0) == (2.0, 3.0)


def test_the_generator_moves_on_every_ratio_th_tick_after_the_guidance_network(networks):
    algorithm = dmdr(networks, ratio_update=3)
    roles = [algorithm.roles_at(Clock(tick, 0, tick % 3)) for tick in range(6)]
    assert roles == [("guidance",), ("guidance",), ("guidance", "generator")] * 2
    assert dmdr(networks, ratio_update=1).roles_at(Clock()) == ("guidance", "generator")


def test_a_reused_estimate_is_what_the_guidance_network_learns_in_the_generators_tick(networks, family, monkeypatch):
    """DMD2's order: the input is the estimate of the level before, noised anew; the estimate made there is the sample."""
    algorithm = dmdr(networks, num_steps=4, reuse_rollout=True)
    monkeypatch.setattr(type(algorithm.level_times), "sample_index", lambda *args: torch.tensor([0, 1, 3, 1]))
    guidance_alone = Clock(tick=8, step=2)
    plain = dmdr(networks, num_steps=4).rollout(batch(), guidance_alone)
    assert algorithm.roles_at(guidance_alone) == ("guidance",)
    assert torch.equal(algorithm.rollout(batch(), guidance_alone).x0, plain.x0)

    clock, calls = Clock(tick=9, step=2, tick_in_step=1), spy(monkeypatch, networks)
    rollout = algorithm.rollout(batch(), clock)
    assert algorithm.roles_at(clock) == ("generator", "guidance")
    assert [len(call["x_t"]) for call in calls] == [3, 1, 1]  # a row of the first level is in no call
    draw, path, grid = rollout.draw, family.path, family.path.grid(4)
    fresh = draw.normal("student_input", SHAPE)
    assert torch.equal(rollout.x_t[0], fresh[0])
    monkeypatch.setattr(type(algorithm.level_times), "sample_index", lambda *args: torch.tensor([0, 0, 2, 0]))
    before = dmdr(networks, num_steps=4).rollout(batch(), clock).x0
    own = path.add_noise(before, fresh, grid[torch.tensor([0, 1, 3, 1])])
    torch.testing.assert_close(rollout.x_t[1:], own[1:], rtol=1e-4, atol=1e-5)

    calls.clear()
    run_update(networks, algorithm, "generator", [rollout], clock)
    run_update(networks, algorithm, "guidance", [rollout], clock)
    student, _, _, learnt = calls
    made = path.to_x0(student["x_t"], student["out"], student["t"])
    assert torch.equal(rollout.x0, made)
    assert not rollout.x0.requires_grad
    tau = algorithm.score_times.sample(draw, "guidance_time", clock.step)
    assert torch.equal(learnt["x_t"], path.add_noise(made, draw.normal("guidance_noise", SHAPE), tau))


def test_a_student_of_its_path_is_given_what_its_sampling_gives_it(networks, family, monkeypatch):
    """Row by row the input at its level is that of the few-step sampler's call there, and the sample is the sampler's."""
    config, grid = DMDRConfig(cfg_r=3.0, student_input="path"), family.path.grid(4)
    algorithm = METHODS["dmdr"](config, Setting(networks, family, grid, SHAPE, 4, CPU, sample_type="ode"))
    level = torch.tensor([0, 1, 3, 1])
    monkeypatch.setattr(type(algorithm.level_times), "sample_index", lambda *args: level)
    rollout, calls = algorithm.rollout(batch(), LATER), spy(monkeypatch, networks)
    with torch.no_grad():
        made = algorithm.sample(rollout.cond, rollout.draw.normal("simulation/0", SHAPE), lambda i: None)
    inputs = torch.stack([call["x_t"] for call in calls], dim=1)
    assert torch.equal(rollout.x_t, inputs[torch.arange(4), level])
    assert torch.equal(rollout.t, grid[level])
    assert torch.equal(rollout.x0, made)


# -- DMDR: rewards ---------------------------------------------------------------------------------------------------


class Redness:
    """A reward: the mean of the red channel; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def __call__(self, images: Tensor, prompts: list[str], *, tick: int) -> Tensor:
        self.asked.append({"images": images, "prompts": prompts, "tick": tick})
        return images[:, 0].mean(dim=(1, 2))


def term(score, weight: float, name: str = "red", prefix: str = "", margin: float = 2.0) -> RewardTerm:
    return RewardTerm(name, score, weight, margin, prefix)


def test_rewards_begin_after_the_cold_start(networks):
    score = Redness()
    algorithm = dmdr(networks, rewards=[term(score, 0.3)], cold_start_iter=3)
    for step, expected in ((0, 0), (2, 0), (3, 1), (4, 2)):
        clock = Clock(tick=2 * step + 1, step=step, tick_in_step=1)
        _, metrics, _ = run_update(networks, algorithm, "generator", [algorithm.rollout(batch(), clock)], clock)
        assert len(score.asked) == expected
        assert ("reward_red" in metrics) == (step >= 3)
        assert metrics.keys() <= set(algorithm.columns["generator"])


def test_the_loss_is_the_weighted_sum(networks, family):
    scores = Redness(), Redness()
    terms = [term(scores[0], 0.3), term(scores[1], 0.2, "hps", "Realistic photo", margin=0.1)]
    algorithm = dmdr(networks, rewards=terms, cold_start_iter=0, dmd_weight=0.7)
    rollout = algorithm.rollout(batch(), LATER)
    loss, metrics, gradients = run_update(networks, algorithm, "generator", [rollout])
    with torch.no_grad():
        images = family.decode(networks.x0("generator", rollout.x_t, rollout.t, rollout.cond), fast=True)
    torch.testing.assert_close(scores[0].asked[0]["images"].detach(), images, rtol=1e-4, atol=1e-5)
    red = images[:, 0].mean(dim=(1, 2))
    expected = 0.3 * (2.0 - red).relu().mean() + 0.2 * (0.1 - red).relu().mean() + 0.7 * metrics["loss_dmd"]
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert float(metrics["reward_red"]) == pytest.approx(float(red.mean()), rel=1e-4)
    assert float(metrics["loss_hps"]) == pytest.approx(float((0.1 - red).relu().mean()), abs=1e-5)
    assert scores[0].asked[0]["prompts"] == PROMPTS
    assert scores[1].asked[0]["prompts"] == [f"Realistic photo {prompt}" for prompt in PROMPTS]
    assert scores[0].asked[0]["tick"] == LATER.tick
    parts = [
        run_update(networks, dmdr(networks, rewards=[t], cold_start_iter=0, dmd_weight=weight), "generator", [rollout])[
            2
        ]
        for t, weight in ((replace(terms[0], weight=0.0), 0.7), (terms[0], 0.0))
    ]
    assert_close(gradients, [a + b for a, b in zip(*parts, strict=True)])


def test_rows_are_decoded_and_scored_so_many_at_a_time(networks, family, monkeypatch):
    decoded, results = [], []
    whole = family.decode
    monkeypatch.setattr(family, "decode", lambda z, fast: (decoded.append(len(z)), whole(z, fast=fast))[1])
    for size in (0, 3):
        scores = Redness(), Redness()
        terms = [
            term(scores[0], 0.3),
            term(scores[1], 0.2, "hps", "Realistic photo", margin=0.1),
            term(Redness(), 0, "off"),
        ]
        algorithm = dmdr(networks, rewards=terms, cold_start_iter=0, dmd_weight=0.7, reward_batch_size=size)
        rollout = algorithm.rollout(batch(), LATER)
        results.append(run_update(networks, algorithm, "generator", [rollout]))
        assert [prompt for call in scores[0].asked for prompt in call["prompts"]] == PROMPTS
    assert decoded == [4, 3, 1]
    (loss, metrics, gradients), (loss_by_parts, metrics_by_parts, gradients_by_parts) = results
    assert loss_by_parts == pytest.approx(loss, rel=1e-5)
    assert {k: float(v) for k, v in metrics_by_parts.items()} == pytest.approx(
        {k: float(v) for k, v in metrics.items()}, rel=1e-5
    )
    assert_close(gradients_by_parts, gradients, rtol=1e-4)


def test_a_reward_of_weight_zero_is_watched_without_changing_the_gradient(networks):
    score = Redness()
    watched = dmdr(networks, rewards=[term(score, 0.0)], cold_start_iter=0)
    bare = dmdr(networks, cold_start_iter=0)
    rollout = watched.rollout(batch(), LATER)
    loss, metrics, gradients = run_update(networks, watched, "generator", [rollout])
    loss_bare, metrics_bare, gradients_bare = run_update(networks, bare, "generator", [rollout])
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_bare, strict=True))
    assert loss == loss_bare
    assert metrics.keys() - metrics_bare.keys() == {"reward_red", "loss_red"}
    assert float(metrics["reward_red"]) == pytest.approx(
        float(score.asked[0]["images"].detach()[:, 0].mean()), rel=1e-5
    )


def test_rewards_alone_need_no_scores(networks, monkeypatch):
    algorithm = dmdr(networks, rewards=[term(Redness(), 1.0)], cold_start_iter=0, dmd_weight=0.0)
    rollout = algorithm.rollout(batch(), LATER)
    calls = spy(monkeypatch, networks)
    _, metrics, gradients = run_update(networks, algorithm, "generator", [rollout])
    assert [call["role"] for call in calls] == ["generator"]
    assert "loss_dmd" not in metrics
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


# -- no result depends on the batching -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("role", ["guidance", "generator"])
def test_four_rows_are_four_times_one_row(networks, role, num_steps):
    algorithm = dmdr(networks, num_steps, [term(Redness(), 0.5)], cold_start_iter=0, cfg_f=2.0)
    together = algorithm.rollout(batch(), LATER)
    alone = [algorithm.rollout(batch([row]), LATER) for row in range(4)]
    for row, single in enumerate(alone):
        torch.testing.assert_close(single.x0[0], together.x0[row], rtol=1e-3, atol=1e-4)
        assert torch.equal(single.t[0], together.t[row])
    loss, _, gradients = run_update(networks, algorithm, role, [together])
    loss_alone, _, gradients_alone = run_update(networks, algorithm, role, alone)
    assert loss == pytest.approx(loss_alone, rel=1e-4)
    assert_close(gradients, gradients_alone)


def assert_same_weights(first, second, step: int, atol: float) -> None:
    mine, other = dict(tiny.checkpoint_files(first, step)), dict(tiny.checkpoint_files(second, step))
    compared = [name for name in mine if name.endswith("model.safetensors")]
    assert compared
    for name in compared:
        for key, value in mine[name].items():
            torch.testing.assert_close(value, other[name][key], rtol=0, atol=atol, msg=f"{name} {key}")


@pytest.mark.parametrize("kind", ["dmdr", "sft", "direct"])
def test_accumulation_of_four_is_a_batch_of_four(trainer, kind, towers):
    """Weights after two steps; a large epsilon keeps Adam from blowing up rounding of near-zero gradients."""
    more = "--adam-epsilon 1e-2 --max-train-steps 2"
    if kind == "dmdr":
        more += f" --sample-num-steps 2 --cold-start-iter 1 --clip-reward-model {towers['clip']}"
    one = trainer.run("one", f"{more} --batch-size 4", kind)
    four = trainer.run("four", f"{more} --batch-size 1 --gradient-accumulation-steps 4", kind)
    start = trainer.run("start", f"{more} --learning-rate-gen 0", kind)
    assert_same_weights(one, four, 2, atol=2e-6)
    with pytest.raises(AssertionError):
        assert_same_weights(one, start, 2, atol=2e-5)  # and they did move
    for mine, other in zip(tiny.log_lines(one), tiny.log_lines(four), strict=True):
        assert mine.keys() == other.keys()
        assert [name for name in mine if mine[name] is None] == [name for name in other if other[name] is None]
        for name in (name for name in mine if mine[name] is not None):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


# -- regression and supervised training ------------------------------------------------------------------------------


def test_regression_is_the_whole_sample_against_the_stored_latent(networks, family, monkeypatch):
    """It starts from the row's own seeded noise, whatever the target is."""
    seeds = [3, 5, 3, 8]
    noise = torch.cat([torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(1))
    for num_steps in (1, 2):
        algorithm = method("direct", networks, DirectConfig(), num_steps)
        calls = spy(monkeypatch, networks)
        rollout = algorithm.rollout(batch(seeds=seeds, latents=latents), LATER)
        loss, _, _ = run_update(networks, algorithm, "generator", [rollout])
        assert len(calls) == num_steps
        assert torch.equal(calls[0]["x_t"], noise)
        assert family.path.levels(calls[0]["t"]).tolist() == [399 if num_steps == 1 else 999] * 4
        last = family.path.to_x0(calls[-1]["x_t"], calls[-1]["out"], calls[-1]["t"])
        assert loss == pytest.approx(float(((last - latents) ** 2).mean()), rel=1e-4)
        monkeypatch.undo()


def test_regression_goes_down(trainer):
    run = trainer.run("direct", "--max-train-steps 12 --batch-size 8 --learning-rate-gen 2e-2", "direct")
    found = [line["loss"] for line in tiny.log_lines(run)]
    assert found[-1] < 0.8 * found[0]
    assert not tiny.log_lines(run, "guidance")


def test_supervised_training_is_the_denoising_loss_on_latents(networks, family, monkeypatch):
    algorithm = method("sft", networks, SFTConfig(caption_dropout=0.0))
    images = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    rollout = algorithm.rollout(batch(images=images), LATER)
    assert torch.equal(rollout.latents, family.to_latents(images))
    calls = spy(monkeypatch, networks)
    loss, _, _ = run_update(networks, algorithm, "generator", [rollout])
    (call,) = calls
    noise = rollout.draw.normal("noise", SHAPE)
    assert torch.equal(call["x_t"], family.path.add_noise(rollout.latents, noise, call["t"]))
    assert loss == pytest.approx(float(((call["out"] - noise) ** 2).mean()), rel=1e-5)


def test_cached_rows_are_encoded_once_and_stay_what_they_are(networks, family, monkeypatch):
    images, seen = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0)), []
    encode = type(family).to_latents
    monkeypatch.setattr(type(family), "to_latents", lambda self, x: seen.append(len(x)) or encode(self, x))
    algorithm = method("sft", networks, SFTConfig(caption_dropout=0.0, cache_rows=True))
    algorithm.rollout(replace(batch(range(2), images=images[:2]), rows=[0, 1]), LATER)
    whole = algorithm.rollout(replace(batch(images=images), rows=range(4)), LATER)
    assert seen == [1, 1, 1, 1]
    torch.testing.assert_close(whole.latents, encode(family, images))
    torch.testing.assert_close(whole.cond.tokens, family.encode(PROMPTS, "").tokens)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_captions_are_dropped_row_by_row(networks, family, share):
    algorithm = method("sft", networks, SFTConfig(caption_dropout=share))
    images, dropped_rows = torch.zeros((4, 3, 32, 32)), 0
    for tick in range(10):
        clock = Clock(tick, tick)
        cond = algorithm.rollout(batch(images=images), clock).cond
        told = family.encode(PROMPTS, "")
        dropped = Draw(4, tick, batch().indices, CPU).uniform("caption_dropout") < share
        dropped_rows += int(dropped.sum())
        for row in range(4):
            source = told.negative if dropped[row] else told
            assert torch.equal(cond.tokens[row], source.tokens[row])
            assert torch.equal(cond.pooled[row], source.pooled[row])
    assert {0.0: dropped_rows == 0, 0.5: 8 < dropped_rows < 32, 1.0: dropped_rows == 40}[share]


def test_dropping_needs_a_negative(family):
    with pytest.raises(AssertionError):
        drop_captions(family.encode(PROMPTS, None), torch.ones(4, dtype=torch.bool))


def test_students_sample_on_their_own_grid_and_sft_as_a_guided_teacher(networks, family, monkeypatch):
    noise = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(0))
    cond, calls = family.encode(PROMPTS, ""), spy(monkeypatch, networks)
    dmdr(networks, num_steps=2).sample(cond, noise, lambda i: noise)
    assert [(call["role"], call["cfg"]) for call in calls] == [("generator", 1.0)] * 2
    calls.clear()
    METHODS["sft"](SFTConfig(), Setting(networks, family, family.path.grid(1), SHAPE, 4, CPU), 3, 5.0).sample(
        cond, noise, lambda i: noise
    )
    assert [(call["role"], call["cfg"]) for call in calls] == [("generator", 5.0)] * 3


# -- counting --------------------------------------------------------------------------------------------------------


def test_a_second_stage_with_another_ratio_keeps_counting(trainer):
    """Steps are counted, not read off the tick: the third tick is no multiple of the new ratio."""
    first = trainer.run("first", "--ratio-update 3 --max-train-steps 1")
    record = first / "checkpoints" / "torch_units" / "step-1.pt"
    second = trainer.run("second", f"--ratio-update 2 --max-train-steps 3 --resume-ckpt {record}")
    counted = [(line["tick"], line["step"], line["samples_seen"]) for line in tiny.log_lines(first, "guidance")]
    assert counted == [(1, 0, 2), (2, 0, 4), (3, 1, 6)]
    counted = [(line["tick"], line["step"], line["samples_seen"]) for line in tiny.log_lines(second, "guidance")]
    assert counted == [(4, 1, 8), (5, 2, 10), (6, 2, 12), (7, 3, 14)]
    assert [line["tick"] for line in tiny.log_lines(second)] == [5, 7]
