"""state.json of a checkpoint: what the user gave to ``save``, and all of an optimizer but tensors.

    {"extra": {"epoch": 1},
     "optimizer": {"groups": [{"parameters": ["up.weight"],
                               "settings": {"lr": 0.01, "betas": {"tuple": [0.9, 0.999]}}}],
                   "state": {"up.weight": {"step": 3}}}}

A setting is a JSON scalar, a tuple, or a tensor of one element:
{"scalar": 0.01, "dtype": "float32"}.
Whatever else a file holds is refused when it is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxzero.documents import naming, parse_json, read_json
from fxzero.errors import CheckpointError, PlanError, UsageError
from fxzero.typed_data import read_value

# Room for a permutation of ten million examples in ``extra``.
MAX_BYTES = 2**27
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


@dataclass(frozen=True)
class Group:
    """A group of an optimizer: the names of its parameters, and its hyperparameters."""

    parameters: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class State:
    """What a checkpoint has besides tensors.

    Attributes:
        extra: what was given to ``save``.
        groups: of the optimizer; none if it was saved without one.
        states: what of an optimizer's state is no tensor, by the parameter's name.
    """

    extra: dict[str, Any]
    groups: tuple[Group, ...]
    states: dict[str, dict[str, Any]]


def written_state(extra: dict[str, Any], settings: dict[str, Any]) -> str:
    """The text of state.json.

    Raises:
        UsageError: ``extra`` is nothing that JSON holds, or nothing that could be read back.
    """
    try:
        text = json.dumps({"extra": extra, "optimizer": settings})
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"extra cannot be written as JSON: {error}") from None
    if len(text) > MAX_BYTES:
        raise UsageError(f"extra has {len(text)} bytes as JSON, more than {MAX_BYTES}")
    parse_json(text, "extra", UsageError, finite=False)
    return text


def read_state(path: Path) -> State:
    """What ``written_state`` wrote.

    Raises:
        CheckpointError: the file holds anything else.
    """
    data = read_json(path, MAX_BYTES, CheckpointError, finite=False)
    with naming(path, CheckpointError):
        return _state(data)


def _state(data: Any) -> State:
    parts = read_value(dict[str, object], data, "state")
    _check_keys(parts, {"extra", "optimizer"}, "state")
    optimizer = read_value(dict[str, object], parts["optimizer"], "optimizer")
    extra = read_value(dict[str, object], parts["extra"], "extra")
    if not optimizer:
        return State(extra, (), {})
    _check_keys(optimizer, {"groups", "state"}, "optimizer")
    groups = read_value(tuple[object, ...], optimizer["groups"], "groups")
    states = read_value(dict[str, dict[str, object]], optimizer["state"], "state")
    return State(
        extra,
        tuple(_group(group, f"groups[{index}]") for index, group in enumerate(groups)),
        {name: _settings(each, f"state.{name}") for name, each in states.items()},
    )


def _group(data: object, where: str) -> Group:
    parts = read_value(dict[str, object], data, where)
    _check_keys(parts, {"parameters", "settings"}, where)
    settings = read_value(dict[str, object], parts["settings"], f"{where}.settings")
    if "params" in settings:
        raise PlanError(f"{where}.settings has params, which are the optimizer's own")
    names = read_value(tuple[str, ...], parts["parameters"], f"{where}.parameters")
    return Group(names, _settings(settings, f"{where}.settings"))


def _settings(values: dict[str, object], where: str) -> dict[str, Any]:
    return {key: _setting(value, f"{where}.{key}") for key, value in values.items()}


def _setting(value: Any, where: str) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case {"tuple": list() as items, **rest} if not rest:
            return tuple(_setting(item, where) for item in items)
        case {"scalar": bool() | int() | float() as number, "dtype": str() as name, **rest} if (
            name in DTYPES and not rest
        ):
            try:
                return torch.tensor(number, dtype=DTYPES[name])
            except (RuntimeError, TypeError, ValueError, OverflowError) as error:
                raise PlanError(f"{where} is no {name}: {error}") from None
    raise PlanError(f"{where} is no setting of an optimizer: {value!r:.80}")


def _check_keys(parts: dict[str, object], known: set[str], where: str) -> None:
    if parts.keys() != known:
        raise PlanError(f"{where} has {sorted(parts)!r:.80}, expected {sorted(known)}")
