"""Optimizer state: exact, by name, in any order, and nothing that does not fit."""

from collections.abc import Callable

import pytest
import torch

from train_t2i.checkpoint import Part, RunFolder
from train_t2i.errors import UserError
from train_t2i.optimizer_state import load_optimizer, optimizer_part


class EightBit(torch.optim.Optimizer):
    """State as bitsandbytes keeps it: bytes, a table, and a Python number."""

    def __init__(self, parameters, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(
                        step=0, state1=torch.zeros_like(parameter, dtype=torch.uint8), qmap1=torch.linspace(-1, 1, 256)
                    )
                state["step"] += 1
                state["state1"] += (parameter.grad.abs() * 50).byte()
                parameter.data -= group["lr"] * state["qmap1"][state["state1"].long()] / state["step"]


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MAKERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "eight_bit": EightBit,
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_bitwise_with_the_parameters_in_another_order(
    run: RunFolder, maker: Callable, dtype: torch.dtype
) -> None:
    straight = model_of(0, dtype)
    train(straight, optimizer := maker(straight.parameters()), 0, 3)
    tensors, values = optimizer_part(optimizer, dict(straight.named_parameters()))
    part = Part({"model": straight.state_dict(), "optimizer": tensors}, {"optimizer": values})
    path = run.save(3, {"accelerator_1": part}, {})
    train(straight, optimizer, 3, 7)

    found = run.load(path)[0]["accelerator_1"]
    resumed = model_of(1, dtype)
    optimizer = maker(list(resumed.parameters())[::-1])
    train(resumed, optimizer, 20, 21)  # state that must go
    resumed.load_state_dict(found.tensors["model"])
    load_optimizer(optimizer, dict(resumed.named_parameters()), found.tensors["optimizer"], found.values["optimizer"])
    train(resumed, optimizer, 3, 7)
    for (name, parameter), other in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(parameter, other), name


def test_state_keeps_its_own_dtype_and_the_learning_rate_comes_from_the_config() -> None:
    model = model_of(0, torch.bfloat16)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 0, 1)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-7  # fp32 moments of a bf16 weight
    other = torch.optim.AdamW(model.parameters(), lr=0.03)
    load_optimizer(other, parameters, *optimizer_part(optimizer, parameters))
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)
            assert other.state[parameter][key].dtype == value.dtype
            assert other.state[parameter][key] is not value
    assert other.param_groups[0]["lr"] == 0.03


def test_parameters_without_state_and_optimizers_that_do_not_fit() -> None:
    model = model_of(0)
    parameters = dict(model.named_parameters())
    fresh = torch.optim.AdamW(model.parameters())
    saved = optimizer_part(fresh, parameters)
    used = torch.optim.AdamW(model.parameters())
    train(model, used, 0, 1)
    load_optimizer(used, parameters, *saved)
    assert not used.state
    with pytest.raises(UserError, match="state of AdamW, this run trains with EightBit"):
        load_optimizer(EightBit(model.parameters()), parameters, *saved)
    with pytest.raises(UserError, match=r"0\.bias and 1 more are in one only"):
        load_optimizer(torch.optim.AdamW(model[2].parameters()), parameters, *saved)
    with pytest.raises(ValueError, match="4 parameters without a name"):
        optimizer_part(fresh, {})
