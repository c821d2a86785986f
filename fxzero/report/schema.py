"""The JSON Schema of plan files, made from the dataclasses that they are read into.

What ``Plan.load`` demands stands in it: every field, its type, no other.  ``docs/plan.schema.json``
is this schema; a test keeps it so.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

from fxzero.plans import SCHEMA_VERSION, STATUSES, Plan

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean"}


def render() -> str:
    """The schema as it is published."""
    return json.dumps(schema(), indent=1) + "\n"


def schema() -> dict[str, Any]:
    """Draft 2020-12."""
    definitions: dict[str, Any] = {}
    _of(Plan, definitions)
    whole = definitions.pop("Plan")
    whole["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    whole["properties"]["status"] = {"enum": list(STATUSES)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fxzero plan",
        **whole,
        "$defs": definitions,
    }


def _of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of an annotation; those of dataclasses stand in ``definitions``."""
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # it may hold itself
            definitions[kind.__name__] = _of_dataclass(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        options = [{"type": "null"} if a is type(None) else _of(a, definitions) for a in args]
        return {"anyOf": options}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(args[1], definitions)}
    assert origin is tuple, kind
    if args[-1] is Ellipsis:
        return {"type": "array", "items": _of(args[0], definitions)}
    items = [_of(each, definitions) for each in args]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _of_dataclass(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {"type": "object"}
    if kind.__doc__:
        made["description"] = " ".join(kind.__doc__.split("\n\n")[0].split())
    made["properties"] = {name: _of(hint, definitions) for name, hint in hints.items()}
    return {**made, "required": list(hints), "additionalProperties": False}


if __name__ == "__main__":
    print(render(), end="")
