"""The whole state of an optimizer as named tensors and JSON values, and back, bit for bit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from train_t2i.errors import UserError


def optimizer_part(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values) of an optimizer's whole state, keyed by parameter name.

    ``parameters`` names every parameter of the optimizer (``dict(module.named_parameters())``; others are ignored).
    Learning rates and the other settings of the groups are not state: they come from the config.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict] = {}
    named = _named(optimizer, parameters)
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                values.setdefault(name, {})[key] = value
            else:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key}: not known how to save it"
                )
    return tensors, {"optimizer": type(optimizer).__name__, "parameters": list(named), "state": values}


def load_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what ``optimizer_part`` took, bit for bit, in its own dtype.  Raises UserError when it does not fit."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    named = _named(optimizer, parameters)
    if (saved := values["optimizer"]) != (mine := type(optimizer).__name__):
        raise UserError(
            f"the checkpoint holds the state of {saved}, this run trains with {mine}", "use the same optimizer flags"
        )
    if odd := sorted(set(values["parameters"]) ^ set(named)):
        raise UserError(
            f"the checkpoint and this run train different parameters: {odd[0]} and {len(odd) - 1} more are in one only",
            "use the same model, layout and ranks",
        )
    optimizer.state.clear()
    steps_on_device = {
        id(parameter): bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, state in values["state"].items():
        optimizer.state[named[name]].update(state)
    for label, tensor in tensors.items():
        name, key = label.rsplit("/", 1)
        parameter = named[name]
        stays = key == "step" and not steps_on_device[id(parameter)]  # torch counts on the CPU, except in fused kernels
        device = tensor.device if stays else parameter.device
        optimizer.state[parameter][key] = tensor.detach().to(device, copy=True)


def _named(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """name -> parameter, for those that the optimizer holds, in its own order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if nameless := [tuple(parameter.shape) for parameter in held if id(parameter) not in names]:
        raise ValueError(
            f"the optimizer holds {len(nameless)} parameters without a name, the first of shape {nameless[0]}"
        )
    return {names[id(parameter)]: parameter for parameter in held}
