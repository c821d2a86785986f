"""Data from JSON as instances of annotated types: what a file says is what its reader takes it for.

    read_value(tuple[int, ...], [1, 2], "sizes")    (1, 2)
    read_value(tuple[int, ...], [1, "2"], "sizes")  PlanError: sizes[1] must be int, not str

Dataclasses are objects with exactly their fields.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

from fxzero.errors import PlanError

# Larger than any count of bytes or operations; such numbers would overflow later.
LARGEST = 10**30


def read_value(kind: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as an instance of the annotation ``kind``; PlanError if it is not.

    Whatever it is, it is an ``object``.
    """
    if kind is object:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        (kind,) = [option for option in args if option is not type(None)]
        return read_value(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise PlanError(f"{where} must be a list, not {type(value).__name__}")
        if args[-1] is Ellipsis:
            return tuple(read_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise PlanError(f"{where} must have {len(args)} items, not {len(value)}")
        return tuple(read_value(k, v, where) for k, v in zip(args, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise PlanError(f"{where} must be an object, not {type(value).__name__}")
        return {key: read_value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and abs(value) < LARGEST:
        return float(value)
    if kind is int and type(value) is int and abs(value) >= LARGEST:
        raise PlanError(f"{where} is larger than anything that is counted")
    if type(value) is not kind:
        raise PlanError(f"{where} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise PlanError(f"{where} must be an object, not {type(value).__name__}")
    hints = _fields(kind)
    missing = sorted(set(hints) - set(value))
    unknown = sorted(set(value) - set(hints))
    if missing or unknown:
        raise PlanError(f"{where}: missing {missing}, unknown {unknown}")
    return kind(
        **{name: read_value(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
    )


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    """Annotations of a dataclass, which Python writes as text and compiles each time."""
    return typing.get_type_hints(kind)
