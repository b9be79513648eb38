"""A role's state in a checkpoint: exact, by name, whatever cut of the parameters the processes hold."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from train_t2i.engine import quantized
from train_t2i.engine.adam import AdamSettings, make_adam, set_rate
from train_t2i.engine.average import average, averaged, tensors_of
from train_t2i.engine.state import Piece, RoleState, _Assembled, _messages, collect, distribute
from train_t2i.errors import UserError

ROWS, COLUMNS = 96, 64  # 6144 elements: above the 4096 from which bitsandbytes quantises


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (ROWS, COLUMNS), "a.bias": (7,), "b.weight": (ROWS, COLUMNS)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def adam(eight_bit: bool) -> AdamSettings:
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    return AdamSettings(0.1, (0.9, 0.999), 1e-8, 0.01, eight_bit)


def whole(named: dict[str, nn.Parameter]) -> list[Piece]:
    return [Piece(name, tuple(p.shape), 0, p.numel(), p, 0) for name, p in named.items()]


def flat_shares(named: dict[str, nn.Parameter], count: int) -> list[list[Piece]]:
    """As ZeRO cuts: all parameters one after the other, in equal shares that begin and end anywhere."""
    order = list(named.items())
    total = sum(p.numel() for _, p in order)
    size = -(-total // count)
    joined = torch.cat([p.detach().view(-1) for _, p in order] + [torch.zeros(size * count - total)])
    shares = []
    for rank in range(count):
        share, pieces, first = nn.Parameter(joined[rank * size : (rank + 1) * size].clone()), [], 0
        for name, p in order:
            begin, end = max(first, rank * size), min(first + p.numel(), (rank + 1) * size)
            if begin < end:
                pieces.append(Piece(name, tuple(p.shape), begin - first, end - begin, share, begin - rank * size))
            first += p.numel()
        shares.append(pieces)
    return shares


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name) + ord(name[0]))
    return torch.randn(shape, generator=generator)


def train(pieces: list[Piece], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for tensor in tensors_of(pieces):
            tensor.grad = torch.zeros_like(tensor)
        for piece in pieces:
            full = gradient(piece.name, piece.shape, step).view(-1)
            piece.of(piece.tensor.grad).copy_(full[piece.start : piece.start + piece.numel])
        optimizer.step()
        average(pieces, optimizer, 0.75)


def saved(shares: list[list[Piece]], optimizers: list[torch.optim.Optimizer]) -> RoleState:
    """What process 0 puts together, the parts of all shares at hand."""
    assembled = _Assembled()
    for pieces, optimizer in zip(shares, optimizers, strict=True):
        for message, part in _messages(pieces, optimizer):
            assembled.put(message, part)
    return assembled.state(shares[0], optimizers[0])


def made(cut: str, seed: int, settings: AdamSettings) -> tuple[list[list[Piece]], list[torch.optim.Optimizer]]:
    named = parameters(seed)
    shares = [whole(named)] if cut == "whole" else flat_shares(named, int(cut))
    return shares, [make_adam({str(i): t for i, t in enumerate(tensors_of(pieces))}, settings) for pieces in shares]


@pytest.mark.parametrize("eight_bit", [False, True], ids=["adamw", "eight_bit"])
@pytest.mark.parametrize("cut", ["whole", "2", "5"])
def test_training_goes_on_bit_for_bit_on_the_same_cut(cut, eight_bit):
    settings = adam(eight_bit)
    shares, optimizers = made(cut, 0, settings)
    for pieces, optimizer in zip(shares, optimizers, strict=True):
        train(pieces, optimizer, 0, 3)
    kept = copy.deepcopy(saved(shares, optimizers))
    others, fresh = made(cut, 1, settings)
    for pieces, optimizer in zip(others, fresh, strict=True):
        distribute(kept, pieces, optimizer)
    for a, b, first, second in zip(shares, others, optimizers, fresh, strict=True):
        train(a, first, 3, 6)
        train(b, second, 3, 6)
        for mine, theirs in zip(a, b, strict=True):
            assert torch.equal(mine.of(mine.tensor), theirs.of(theirs.tensor))


def moved(before: str, after: str, settings: AdamSettings) -> tuple[RoleState, RoleState]:
    """The state after three steps on one cut, and as another cut that loaded it saves it."""
    shares, optimizers = made(before, 0, settings)
    for pieces, optimizer in zip(shares, optimizers, strict=True):
        train(pieces, optimizer, 0, 3)
    kept = saved(shares, optimizers)
    others, fresh = made(after, 1, settings)
    for pieces, optimizer in zip(others, fresh, strict=True):
        distribute(kept, pieces, optimizer)
    again = saved(others, fresh)
    return kept, again


@pytest.mark.parametrize(("before", "after"), [("whole", "2"), ("5", "2"), ("3", "whole")])
def test_another_cut_has_the_same_numbers(before, after):
    """fp32 state: bit for bit."""
    kept, again = moved(before, after, adam(False))
    assert {name: tensor.shape for name, tensor in kept.model.items()} == {n: p.shape for n, p in parameters().items()}
    assert again.values == kept.values
    for first, second in ((kept.model, again.model), (kept.optimizer, again.optimizer)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("before", "after"), [("whole", "3"), ("2", "whole"), ("2", "5")])
def test_another_cut_of_eight_bit_state_is_quantised_anew(before, after):
    """Numbers within a step of the table (2.4 % of a block's largest is its widest gap); the codes are not carried over."""
    kept, again = moved(before, after, adam(True))
    for piece in whole(parameters()):
        for key in quantized.CODES:
            first = quantized._numbers(piece, key, kept.optimizer, kept.values["segments"][piece.name])
            second = quantized._numbers(piece, key, again.optimizer, again.values["segments"][piece.name])
            assert first.abs().max() > 0
            assert float((first - second).abs().max()) < 0.012 * float(first.abs().max())


def test_what_is_collected_is_a_copy_and_has_no_state_before_a_step():
    named = parameters()
    optimizer = make_adam(named, adam(False))
    found = collect(whole(named), optimizer, rank=0, world=1)
    assert (found.optimizer, found.values["step"]) == ({}, 0)
    before = found.model["a.bias"].clone()
    train(whole(named), optimizer, 0, 1)
    assert torch.equal(found.model["a.bias"], before)
    assert collect(whole(named), optimizer, rank=1, world=1) == RoleState()  # the first has everything


def test_the_state_of_another_optimizer_is_refused():
    named = parameters()
    optimizer = make_adam(named, adam(False))
    found = collect(whole(named), optimizer, rank=0, world=1)
    other = replace(found, values=found.values | {"optimizer": "AdamW8bit"})
    with pytest.raises(UserError, match="state of AdamW8bit, this run trains with AdamW"):
        distribute(other, whole(named), optimizer)


def test_creating_state_moves_nothing():
    from train_t2i.engine.adam import create_state

    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = make_adam(named, replace(adam(False), epsilon=0.0))
    create_state(optimizer, list(named.values()))
    assert all(torch.equal(p, before[name]) for name, p in named.items())
    assert all(optimizer.state[p]["exp_avg"].abs().sum() == 0 for p in named.values())
    assert optimizer.param_groups[0]["lr"] == 0.1


# -- the moving average, groups of their own rates -------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["whole", "3"])
def test_an_average_is_the_recursion_over_all_updates(cut):
    """ema <- weights + decay (ema - weights), and the first weights to begin with."""
    shares, optimizers = made(cut, 0, adam(False))
    expected: dict[str, torch.Tensor] = {}
    for step in range(4):
        for pieces, optimizer in zip(shares, optimizers, strict=True):
            train(pieces, optimizer, step, step + 1)
        weights = saved(shares, optimizers).model
        expected = {n: w.clone() if step == 0 else w + 0.75 * (expected[n] - w) for n, w in weights.items()}
    found = saved(shares, optimizers)
    for name, mean in expected.items():
        torch.testing.assert_close(found.average[name], mean)
        assert not torch.equal(mean, found.model[name])


@pytest.mark.parametrize("eight_bit", [False, True], ids=["adamw", "eight_bit"])
@pytest.mark.parametrize(("first", "then"), [("whole", "3"), ("3", "2"), ("2", "whole")])
def test_an_average_moves_to_another_cut(first, then, eight_bit):
    shares, optimizers = made(first, 0, adam(eight_bit))
    for pieces, optimizer in zip(shares, optimizers, strict=True):
        train(pieces, optimizer, 0, 3)
    kept = copy.deepcopy(saved(shares, optimizers))
    others, fresh = made(then, 1, adam(eight_bit))
    for pieces, optimizer in zip(others, fresh, strict=True):
        distribute(kept, pieces, optimizer)
    again = saved(others, fresh)
    assert kept.average.keys() == kept.model.keys()
    assert all(torch.equal(mean, again.average[name]) for name, mean in kept.average.items())


def test_averages_stand_in_for_the_weights_for_a_while():
    (pieces,), (optimizer,) = made("whole", 0, adam(False))
    with averaged(pieces, optimizer, lambda: pytest.fail("there are none yet")):
        pass
    train(pieces, optimizer, 0, 3)
    weights = [piece.tensor.detach().clone() for piece in pieces]
    seen = []
    with averaged(pieces, optimizer, lambda: seen.append(pieces[0].tensor.detach().clone())):
        for piece in pieces:
            assert torch.equal(piece.tensor, optimizer.state[piece.tensor]["ema"])
    assert all(torch.equal(piece.tensor, before) for piece, before in zip(pieces, weights, strict=True))
    assert not any(
        torch.equal(optimizer.state[p.tensor]["ema"], before) for p, before in zip(pieces, weights, strict=True)
    )


@pytest.mark.parametrize("eight_bit", [False, True], ids=["adamw", "eight_bit"])
def test_a_part_may_learn_at_a_rate_of_its_own(eight_bit):
    """Adam's first step is as long as the rate, whatever the gradient."""
    named = parameters()
    settings = replace(adam(eight_bit), weight_decay=0.0, factors={r"^b\.": 0.1})
    optimizer = make_adam(named, settings)
    set_rate(optimizer, 0.5)
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, parameter in named.items():
        parameter.grad = gradient(name, tuple(parameter.shape), 0)
    optimizer.step()
    for name, parameter in named.items():
        moved = (parameter - before[name]).abs().median()
        assert float(moved) == pytest.approx(0.05 if name.startswith("b.") else 0.5, rel=1e-3)
