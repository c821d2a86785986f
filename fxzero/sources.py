"""A model named on the command line -> a module on the meta device with inputs that fit it.

Three kinds of names, tried in this order:

    gpt2                    a preset: a configuration that ships with fxzero
    path/to/config.json     a configuration (``configurations.py``); no weights are read
    package.module:factory  a function of yours that returns (module, inputs)

Nothing is downloaded, and whatever the size of the model it costs no memory, unless a factory
cannot run under ``torch.device("meta")``.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero.configuration_limits import DTYPES
from fxzero.configurations import build_configuration
from fxzero.errors import UsageError, described
from fxzero.structure import flatten

log = logging.getLogger(__name__)

_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Source:
    """A model in training mode and one call of it: ``model(*args, **kwargs)``."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_model(
    spec: str, *, batch: int | None = None, seq: int | None = None, dtype: str | None = None
) -> Source:
    """The model that ``spec`` names, and its inputs, on the meta device.

    Args:
        spec: a preset, a path to a config.json, or ``package.module:factory``.
        batch, seq, dtype: sizes of the inputs and dtype of the weights. None: 1, 1024 or what the
            model can take, and the dtype that the configuration names. A factory gets those that
            were given as keyword arguments.

    Raises:
        UsageError: the model cannot be found or built, or cannot have such inputs.
    """
    for name, size in (("batch", batch), ("seq", seq)):
        if size is not None and size < 1:
            raise UsageError(f"{name}={size} must be positive")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    if spec in presets():
        return _from_config(spec, _PRESETS / f"{spec}.json", batch, seq, dtype)
    if spec.endswith(".json") or os.sep in spec:
        return _from_config(spec, Path(spec), batch, seq, dtype)
    if ":" in spec:
        return _from_factory(spec, batch, seq, dtype)
    nearest = difflib.get_close_matches(spec, presets(), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UsageError(
        f"no model {spec!r}{hint}\n"
        f"  presets: {', '.join(presets())}\n"
        "  or write path/to/config.json, or package.module:factory"
    )


def load_factory(spec: str) -> Source:
    """The module and inputs that a factory returns, as they are: real tensors if it makes such.

    Raises:
        UsageError: as ``load_model``.
    """
    if ":" not in spec:
        raise UsageError(f"{spec!r} is not a factory: write package.module:factory")
    return _call(spec, _find_factory(spec), {})


def presets() -> list[str]:
    """Names of the configurations that ship with fxzero."""
    return sorted(path.stem for path in _PRESETS.glob("*.json"))


def _from_config(
    name: str, path: Path, batch: int | None, seq: int | None, dtype: str | None
) -> Source:
    weights = None if dtype is None else DTYPES[dtype]
    model, inputs = build_configuration(path, batch=batch, seq=seq, dtype=weights)
    return Source(name, model.train(), (), inputs)


# Factories


def _from_factory(spec: str, batch: int | None, seq: int | None, dtype: str | None) -> Source:
    factory = _find_factory(spec)
    options = {"batch": batch, "seq": seq, "dtype": dtype and DTYPES[dtype]}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if not _takes(factory, name):
            raise UsageError(
                f"--{name} has no effect: {spec} takes no argument {name!r}\n"
                f"  leave it out, or add the argument to the factory"
            )
    try:
        with torch.device("meta"):
            return _on_meta(_call(spec, factory, given))
    except UsageError as error:
        log.info("%s does not run under torch.device('meta'), trying without: %s", spec, error)
    return _on_meta(_call(spec, factory, given))


def _find_factory(spec: str) -> Callable[..., Any]:
    module_name, _, attribute = spec.partition(":")
    if not sys.flags.safe_path and "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not look into the working directory
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"cannot import {module_name!r}: {described(error)}") from error
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if factory is None or not callable(factory):
        nearest = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(f"{module_name!r} has no function {attribute!r}{hint}")
    return factory


def _takes(factory: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(factory).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _call(spec: str, factory: Callable[..., Any], options: dict[str, Any]) -> Source:
    try:
        result = factory(**options)
    except Exception as error:
        raise UsageError(f"{spec} raised {described(error)}") from error
    match result:
        case (nn.Module() as model, tuple() | list() as args, dict() as kwargs):
            return Source(spec, model.train(), tuple(args), kwargs)
        case (nn.Module() as model, dict() as kwargs):
            return Source(spec, model.train(), (), kwargs)
        case (nn.Module() as model, tuple() | list() as args):
            return Source(spec, model.train(), tuple(args), {})
        case (nn.Module() as model, torch.Tensor() as tensor):
            return Source(spec, model.train(), (tensor,), {})
    raise UsageError(
        f"{spec} returned {type(result).__name__}, expected (module, inputs) "
        "or (module, args, kwargs)"
    )


def _on_meta(source: Source) -> Source:
    """The same with every tensor on the meta device; tensors that were one stay one."""
    inputs, structure = flatten((source.args, source.kwargs))
    tensors = [*source.model.parameters(), *source.model.buffers(), *inputs]
    memo: dict[int, Any] = {id(tensor): _meta_like(tensor) for tensor in tensors}
    args, kwargs = structure.fill([memo[id(tensor)] for tensor in inputs])
    return Source(source.name, copy.deepcopy(source.model, memo), args, kwargs)


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
    ).requires_grad_(tensor.requires_grad)
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
