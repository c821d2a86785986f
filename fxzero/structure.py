"""Taking tensors out of any Python value, and putting others back in their places.

Models return tuples, dictionaries, dataclasses, library classes with tensors inside (key-value
caches), and nestings of them.  ``flatten`` finds every tensor without asking anybody to register
a type; ``Structure.fill`` builds an equal value with other tensors in the same places.

    flatten({"loss": a, "cache": Cache(k=b)})  ->  [a, b], structure
    structure.fill([c, d])                     ->  {"loss": c, "cache": Cache(k=d)}

The same tensor object found twice is one leaf: aliasing survives the round trip.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxzero import _torch

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, type, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format, torch.nn.Module, torch.Generator,
)  # fmt: skip


_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Leaf:
    index: int


@dataclass(frozen=True)
class _Node:
    """A container: children in a fixed order, and how to build an equal one around others."""

    children: tuple[Any, ...]
    build: Any


@dataclass(frozen=True)
class Structure:
    """The shape of a value with its tensors taken out.

    Attributes:
        paths: where each tensor was, such as "['loss']" or "cache.layers[0].keys".
        key: hashable summary of containers and constants: equal for calls that trace alike.
    """

    template: Any
    leaf_count: int
    paths: tuple[str, ...]
    key: tuple[Hashable, ...] = field(compare=False)

    def fill(self, leaves: Sequence[Any]) -> Any:
        """The value again, with ``leaves[i]`` where the i-th tensor was."""
        assert len(leaves) == self.leaf_count, f"{len(leaves)} leaves for {self.leaf_count}"
        return _fill(self.template, leaves)


def flatten(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """All tensors inside ``value``, depth first, and the structure that held them."""
    walk = _Walk()
    template = walk.visit(value, "")
    return walk.leaves, Structure(template, len(walk.leaves), tuple(walk.paths), tuple(walk.key))


class _Walk:
    def __init__(self) -> None:
        self.leaves: list[torch.Tensor] = []
        self.paths: list[str] = []
        self.key: list[Hashable] = []
        self._leaf_of: dict[int, _Leaf] = {}
        self._active: set[int] = set()

    def visit(self, value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            leaf = self._leaf(value, path)
            self.key.append((path, leaf.index))
            return leaf
        if isinstance(value, _ATOMS) or id(value) in self._active:
            self.key.append((path, value if isinstance(value, _VALUES) else id(value)))
            return value
        self.key.append((path, type(value)))
        self._active.add(id(value))
        try:
            return self._container(value, path)
        finally:
            self._active.discard(id(value))

    def _leaf(self, tensor: torch.Tensor, path: str) -> _Leaf:
        leaf = self._leaf_of.get(id(tensor))
        if leaf is None:
            leaf = self._leaf_of[id(tensor)] = _Leaf(len(self.leaves))
            self.leaves.append(tensor)
            self.paths.append(path.lstrip("."))
        return leaf

    def _container(self, value: Any, path: str) -> Any:
        if (registered := _torch.flatten_one_level(value)) is not None:
            children, keys, build = registered
            return self._node(value, children, [f"{path}{key}" for key in keys], build)
        if isinstance(value, Mapping) and hasattr(value, "copy"):
            keys = list(value)
            children = [value[key] for key in keys]
            paths = [f"{path}.{key}" for key in keys]
            return self._node(value, children, paths, _MappingBuilder(value, tuple(keys)))
        fields = _fields(value)
        if fields is None:
            return value
        children = [getattr(value, name) for name in fields]
        paths = [f"{path}.{name}" for name in fields]
        return self._node(value, children, paths, _ObjectBuilder(value, tuple(fields)))

    def _node(self, value: Any, children: Sequence[Any], paths: Sequence[str], build: Any) -> Any:
        visited = tuple(self.visit(c, p) for c, p in zip(children, paths, strict=True))
        return _Node(visited, build) if any(map(_holds_leaf, visited)) else value


def _holds_leaf(value: Any) -> bool:
    if isinstance(value, _Leaf):
        return True
    return isinstance(value, _Node) and any(_holds_leaf(child) for child in value.children)


def _fields(value: Any) -> list[str] | None:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    if hasattr(value, "__dict__"):
        return list(vars(value))
    return None


@dataclass(frozen=True)
class _MappingBuilder:
    original: Any
    keys: tuple[Any, ...]

    def __call__(self, children: Sequence[Any]) -> Any:
        result = self.original.copy()
        for key, child in zip(self.keys, children, strict=True):
            result[key] = child
        return result


@dataclass(frozen=True)
class _ObjectBuilder:
    original: Any
    names: tuple[str, ...]

    def __call__(self, children: Sequence[Any]) -> Any:
        result = copy.copy(self.original)
        for name, child in zip(self.names, children, strict=True):
            object.__setattr__(result, name, child)
        return result


def _fill(template: Any, leaves: Sequence[Any]) -> Any:
    if isinstance(template, _Leaf):
        return leaves[template.index]
    if isinstance(template, _Node):
        return template.build([_fill(child, leaves) for child in template.children])
    return template
