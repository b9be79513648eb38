"""Direct Distillation: what its loss is, that no memory policy changes it, and whose times it trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from flow_models import save_flow
from test_methods import CPU, LATER, PROMPTS, assert_close, batch, run_update, spy
from torch import Tensor

import rewards
from train_t2i.config import DirectConfig
from train_t2i.families import Family, load_family
from train_t2i.methods import METHODS, Batch, Setting
from train_t2i.methods.direct import Direct
from train_t2i.networks import Networks
from train_t2i.sampling import trajectory

SEEDS = [3, 5, 8, 13]


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def family(request: pytest.FixtureRequest, sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    if request.param == "sdxl":
        return load_family("auto", str(sdxl_folder))
    return load_family("auto", str(save_flow(tmp_path_factory.mktemp("flux"), "flux")), shift=3.0, text_length=24)


def shape_of(family: Family) -> tuple[int, int, int]:
    return family.latent_channels, 4, 4


@pytest.fixture(scope="module")
def networks(family: Family) -> Networks:
    networks = tiny.networks(family, "shared")
    tiny.shake(networks.modules["base"])
    return networks


def direct(networks: Networks, num_steps: int = 3, *, features=None, need_all: bool = False, **config) -> Direct:
    family = networks.family
    grid = family.path.grid(num_steps)
    setting = Setting(
        networks, family, grid, shape_of(family), 4, CPU, features=features, sample_type="ode", calls_need_all=need_all
    )  # fmt: skip
    return METHODS["direct"](DirectConfig(**config), setting)


def results(networks: Networks, **extra) -> Batch:
    """Four rows, and latents that a teacher might have made of them."""
    shape = shape_of(networks.family)
    latents = torch.randn((4, *shape), generator=torch.Generator().manual_seed(1))
    return batch(seeds=SEEDS, latents=latents, **extra)


def updated(networks: Networks, rows: Batch, num_steps: int = 3, **config) -> tuple[float, dict, list[Tensor]]:
    algorithm = direct(networks, num_steps, **config)
    return run_update(networks, algorithm, "generator", [algorithm.rollout(rows, LATER)])


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_finite_differences(networks):
    """Through every call, and through the state that is handed from one to the next."""
    rows = results(networks)
    _, _, gradients = updated(networks, rows)
    parameters = networks.parameters("generator")
    length = torch.cat([g.flatten() for g in gradients]).norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += sign * 0.01 * gradient / length
        losses.append(updated(networks, rows)[0])
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= sign * 0.01 * gradient / length
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(float(length), rel=0.02)


def test_all_of_a_batch_is_what_its_rows_are_alone(networks):
    rows = results(networks)
    together = updated(networks, rows)
    algorithm = direct(networks)
    alone = [
        algorithm.rollout(batch([i], seeds=[SEEDS[i]], latents=rows.latents[i : i + 1]), LATER) for i in range(4)
    ]  # fmt: skip
    loss, _, gradients = run_update(networks, algorithm, "generator", alone)
    assert together[0] == pytest.approx(loss, rel=1e-4)
    assert_close(together[2], gradients)


def test_huber_counts_large_differences_linearly(networks):
    rows, delta = results(networks), 0.3
    algorithm = direct(networks, huber_delta=delta)
    rollout = algorithm.rollout(rows, LATER)
    sample = algorithm.sample(rollout.cond, rollout.noise, lambda i: pytest.fail("no fresh noise is needed"))
    error = (sample - rollout.target).abs()
    expected = torch.where(error < delta, 0.5 * error**2, delta * (error - delta / 2)).mean()
    assert updated(networks, rows, huber_delta=delta)[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_towers_view_of_both_images_is_compared(networks, towers):
    """The term alone: its value by the tower itself, its gradient through decoder and sampler."""
    tower, rows = rewards.REWARDS["clip"](str(towers["clip"])), results(networks)
    plain = updated(networks, rows)
    loss, metrics, gradients = updated(networks, rows, features=tower.encode_images, feature_weight=0.5)
    algorithm = direct(networks)
    rollout = algorithm.rollout(rows, LATER)
    sample = algorithm.sample(rollout.cond, rollout.noise, lambda i: pytest.fail("no fresh noise is needed"))
    views = [tower.encode_images(networks.family.decode(z)) for z in (sample, rollout.target)]
    expected = float(1 - F.cosine_similarity(*views).mean())
    assert float(metrics["loss_features"]) == pytest.approx(expected, rel=1e-4)
    assert loss == pytest.approx(plain[0] + 0.5 * expected, rel=1e-4)
    assert float(metrics["loss_latent"]) == pytest.approx(plain[0], rel=1e-5)
    difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, plain[2], strict=True)])
    assert difference.norm() > 0


def test_the_teachers_states_are_targets_of_the_students(networks):
    states = torch.randn((4, 2, *shape_of(networks.family)), generator=torch.Generator().manual_seed(2))
    rows = results(networks, states=states)
    algorithm = direct(networks, states_weight=0.25)
    rollout = algorithm.rollout(rows, LATER)
    family, setting = networks.family, algorithm.setting
    passed = trajectory(
        lambda x, t: networks.x0("generator", x, t, rollout.cond), family.path, setting.grid, rollout.noise, None
    )
    expected = float(((torch.stack(passed[:2], dim=1) - states) ** 2).mean())
    loss, metrics, _ = updated(networks, rows, states_weight=0.25)
    assert float(metrics["loss_states"]) == pytest.approx(expected, rel=1e-4)
    assert loss == pytest.approx(float(metrics["loss_latent"]) + 0.25 * expected, rel=1e-4)
    assert algorithm.columns["generator"] == ("loss", "loss_latent", "loss_states")


def test_an_image_is_the_mean_of_its_encoding(networks):
    images = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    algorithm = direct(networks)
    first, second = (algorithm.rollout(batch(seeds=SEEDS, images=images), LATER).target for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, networks.family.to_latents(images))


# -- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(networks: Networks, rows: Batch, **config) -> int:
    """What a forward pass leaves for its backward, each storage counted once; weights are not."""
    algorithm, seen = direct(networks, **config), {}
    rollout = algorithm.rollout(rows, LATER)
    weights = {p.untyped_storage().data_ptr() for p in networks.modules["base"].parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    with networks.updating("generator"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = next(iter(algorithm.losses("generator", rollout, LATER)))
        del loss
    return sum(size for size, _ in seen.values())


def test_no_memory_policy_changes_the_gradient(networks):
    """None, blocks, steps, and both at once."""
    rows, base = results(networks), networks.modules["base"]
    plain = updated(networks, rows)
    by_step = updated(networks, rows, step_checkpointing=True)
    base.enable_gradient_checkpointing()
    base.train()  # diffusers checkpoints only then; these networks have no dropout
    try:
        by_block, by_both = updated(networks, rows), updated(networks, rows, step_checkpointing=True)
    finally:
        base.disable_gradient_checkpointing()
        base.eval()
    for other in (by_step, by_block, by_both):
        assert other[0] == plain[0]
        assert_close(other[2], plain[2], rtol=1e-5)


def test_step_checkpointing_keeps_little_more_than_the_latents(networks):
    rows = results(networks)
    latents = 3 * 4 * rows.latents.numel()
    assert kept_bytes(networks, rows, step_checkpointing=True) < 4 * latents
    assert kept_bytes(networks, rows) > 40 * latents


def test_truncation_is_the_gradient_of_the_last_steps_alone(networks, monkeypatch):
    rows = results(networks)
    loss, _, gradients = updated(networks, rows, backprop_steps=1)
    whole = updated(networks, rows)
    assert loss == pytest.approx(whole[0], rel=1e-6)
    algorithm, path = direct(networks), networks.family.path
    rollout = algorithm.rollout(rows, LATER)
    before = trajectory(
        lambda x, t: networks.x0("generator", x, t, rollout.cond), path, rollout.grid[:3], rollout.noise, None
    )[-1]  # without a graph: nothing is being updated
    with networks.updating("generator"):
        t, s = (rollout.grid[i].expand(4) for i in (2, 3))
        last = path.step(before, networks.x0("generator", before, t, rollout.cond), t, s)
        found = torch.autograd.grad(F.mse_loss(last, rollout.target), networks.parameters("generator"))
    assert_close(gradients, list(found), rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_close(gradients, whole[2])
    assert kept_bytes(networks, rows, backprop_steps=1) < 0.5 * kept_bytes(networks, rows)


# -- rows of their own numbers of steps ------------------------------------------------------------------------------


def test_rows_have_their_own_numbers_of_steps(networks):
    """Samples and gradients are those of each row alone on its own grid."""
    steps = [1, 3, 2, 3]
    rows = results(networks, num_steps=steps)
    together = updated(networks, rows, max_row_steps=4)
    gradients, loss = None, 0.0
    for i, own in enumerate(steps):
        algorithm = direct(networks, own)
        alone = algorithm.rollout(batch([i], seeds=[SEEDS[i]], latents=rows.latents[i : i + 1]), LATER)
        value, _, found = run_update(networks, algorithm, "generator", [alone])
        loss += value / 4
        gradients = (
            [g / 4 for g in found] if gradients is None else [a + g / 4 for a, g in zip(gradients, found, strict=True)]
        )
    assert together[0] == pytest.approx(loss, rel=1e-4)
    assert_close(together[2], gradients)
    cut = updated(networks, rows, max_row_steps=4, backprop_steps=1)
    assert cut[0] == pytest.approx(loss, rel=1e-4)
    assert not torch.isnan(torch.cat([g.flatten() for g in cut[2]])).any()
    with pytest.raises(AssertionError):
        assert_close(cut[2], together[2])


def test_where_calls_need_all_every_process_makes_as_many(networks, monkeypatch):
    rows = results(networks, num_steps=[1, 1, 2, 1])
    calls = spy(monkeypatch, networks)
    plain = updated(networks, rows, max_row_steps=4)
    assert len(calls) == 2
    calls.clear()
    whole = updated(networks, rows, max_row_steps=4, need_all=True)
    assert len(calls) == 4
    assert whole[0] == plain[0]
    assert_close(whole[2], plain[2], rtol=1e-6)


def test_its_times_are_those_it_is_sampled_at(networks, monkeypatch):
    algorithm, prompts = direct(networks, 3), PROMPTS
    rollout = algorithm.rollout(results(networks), LATER)
    calls = spy(monkeypatch, networks)
    with networks.updating("generator"):
        list(algorithm.losses("generator", rollout, LATER))
    trained = [call["t"] for call in calls]
    calls.clear()
    with torch.no_grad():
        algorithm.sample(networks.family.encode(prompts), rollout.noise, lambda i: rollout.noise)
    assert len(trained) == 3
    assert all(torch.equal(a, call["t"]) for a, call in zip(trained, calls, strict=True))
