"""What is in a checkpoint: tensors by name, and all else as JSON.

    model.<name>                  parameters and buffers, by their qualified names
    optimizer.<name>.<state>      the optimizer's state of a parameter, such as exp_avg
    rng.<rank>.<device>           states of random generators

Ranks of a pipeline each have those of their stages.

A tensor under several names (tied weights) is written once, under the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxzero.checkpoint.state import State
from fxzero.errors import CheckpointError, listed
from fxzero.sharding import ids_elsewhere

Tensors = dict[str, torch.Tensor]
_JSON = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Contents:
    """A training state, taken apart.

    Attributes:
        tensors: by name; those of the model and the optimizer are the live ones.
        settings: the optimizer's groups and what of its state is no tensor.
    """

    tensors: Tensors
    settings: dict[str, Any]


def model_tensors(model: nn.Module) -> Tensors:
    """The model's parameters and buffers that this rank has and that are saved, each once."""
    elsewhere = ids_elsewhere(model)
    return {
        f"model.{names[0]}": tensor.detach()
        for names, tensor in named_tensors(model)
        if id(tensor) not in elsewhere
    }


def named_tensors(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Each tensor of the model's state, with all its names: tied weights have several."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), ([], value))[0].append(name)
    return list(found.values())


def optimizer_contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contents:
    """The optimizer's tensors and settings, by the names of the model's parameters."""
    names = parameter_names(model, optimizer)
    tensors: Tensors = {}
    rest: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value.detach()
            else:
                rest.setdefault(name, {})[key] = _plain(value, f"optimizer state {name}.{key}")
    groups = [
        {
            "parameters": [names[id(p)] for p in group["params"]],
            "settings": {k: _plain(v, k) for k, v in group.items() if k != "params"},
        }
        for group in optimizer.param_groups
    ]
    return Contents(tensors, {"groups": groups, "state": rest})


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The model's name of each parameter of the optimizer, by ``id``.

    Raises:
        CheckpointError: the optimizer has a parameter that the model has not.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not "
                    "the model's\n  make the optimizer after fxzero.compile, which cuts a pipeline "
                    "when it is given example_inputs"
                )
    return names


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved_state: State, tensors: Tensors
) -> None:
    """Gives an optimizer the settings and the state that ``optimizer_contents`` took apart."""
    names = parameter_names(model, optimizer)
    saved = {name: group for group in saved_state.groups for name in group.parameters}
    for group in optimizer.param_groups:
        mine = [names[id(p)] for p in group["params"]]
        known = [saved[name] for name in mine if name in saved]
        if len(known) < len(mine) or any(other is not known[0] for other in known):
            raise CheckpointError(
                "the optimizer groups parameters in another way than the checkpoint\n"
                f"  here: {listed(mine, 3)}\n  there: "
                + "; ".join(listed(group.parameters, 3) for group in saved_state.groups)
            )
        if known:
            group.update(known[0].settings)
    states: dict[str, dict[str, Any]] = {name: dict(s) for name, s in saved_state.states.items()}
    for key, value in tensors.items():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        states.setdefault(name, {})[kind] = value
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for name, state in states.items():
        if name in by_name:
            optimizer.state[by_name[name]] = state


def empty_like_saved(
    shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor
) -> torch.Tensor:
    """Where an optimizer's saved tensor goes: spread as its parameter is, if it has its shape."""
    if shape == tuple(like.shape):
        return torch.zeros_like(like, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype)


def _plain(value: Any, what: str) -> Any:
    """A setting as JSON has it; a learning rate may be a tensor of one element."""
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return {"scalar": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return {"tuple": [_plain(item, what) for item in value]}
    if isinstance(value, _JSON):
        return value
    raise CheckpointError(f"{what} is {type(value).__name__} {value!r}, which cannot be saved")
