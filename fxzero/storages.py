"""Which memory stands behind every value of a graph.

Memory is counted in storages, not tensors: a view costs nothing and keeps its whole base alive.
Every tensor leaf of every node is mapped to a storage number; a node whose output shares the
memory of one of its arguments gets the argument's number.

    x = mm(a, b)          storage 3, 4096 bytes
    y = x.t()             storage 3
    o, m, r = norm(y)     storages 4, 5, 6
    z = getitem(o)        storage 4
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx


@dataclass(frozen=True)
class Storages:
    """The storages of a graph.

    Attributes:
        of: for each node, the storage number of each tensor leaf of its value, in order.
        bytes: size by storage number.
        maker: the node that made each storage.
    """

    of: dict[fx.Node, tuple[int, ...]]
    bytes: list[int]
    maker: list[fx.Node]

    def is_view(self, node: fx.Node) -> bool:
        """Whether the node makes no storage of its own (and is not an input)."""
        mine = self.of.get(node, ())
        return bool(mine) and all(self.maker[s] is not node for s in mine)


def analyse(nodes: Iterable[fx.Node]) -> Storages:
    """Storages of nodes in order; every node needs ``meta["val"]`` (fake or real tensors)."""
    of: dict[fx.Node, tuple[int, ...]] = {}
    sizes: list[int] = []
    maker: list[fx.Node] = []
    inputs: dict[int, int] = {}
    for node in nodes:
        if node.op == "output":
            continue
        if node.target is operator.getitem:
            of[node] = _select(node, of)
            continue
        known = _argument_storages(node, of) if node.op != "placeholder" else inputs
        numbers = []
        for leaf in tensor_leaves(node.meta.get("val")):
            key = storage_identity(leaf)
            number = known.get(key)
            if number is None:
                number = known[key] = len(sizes)
                sizes.append(_storage_bytes(node, leaf))
                maker.append(node)
            numbers.append(number)
        of[node] = tuple(numbers)
    return Storages(of, sizes, maker)


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """Tensors inside a node's value; nested tuples are walked in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def fills_storage(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, each once, and nothing else lies in the storage."""
    return is_dense(tensor) and tensor.nbytes == tensor.untyped_storage().nbytes()


def is_scalar(node: fx.Node) -> bool:
    """Whether the node's value is one tensor without dimensions."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim == 0


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by the names in its schema; defaults where none is given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared}
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node writes to, by its operator's schema."""
    found: list[fx.Node] = []
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        given = arguments_by_name(node)
        for argument in target._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                fx.map_arg(given[argument.name], found.append)
    return found


# On the CPU these compute the unreduced loss first and return its storage with one element in use.
_REDUCED_IN_PLACE = {
    torch.ops.aten.mse_loss.default,
    torch.ops.aten.smooth_l1_loss.default,
    torch.ops.aten.binary_cross_entropy.default,
    torch.ops.aten.soft_margin_loss.default,
}


def _storage_bytes(node: fx.Node, leaf: torch.Tensor) -> int:
    """Bytes of the storage that the operator really makes; fake tensors err for a few."""
    if node.target in _REDUCED_IN_PLACE and leaf.device.type == "cpu":
        source = _first_argument(node)
        return source.numel() * source.element_size()
    if node.target is torch.ops.aten.copy.default:
        # Keeps its first argument's strides by cloning the whole storage behind it.
        return _first_argument(node).untyped_storage().nbytes()
    return leaf.untyped_storage().nbytes()


def _first_argument(node: fx.Node) -> torch.Tensor:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: torch.Tensor = source.meta["val"]
    return value


def storage_identity(tensor: torch.Tensor) -> int:
    """A number that two tensors share exactly if they share their storage, while it lives."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _argument_storages(node: fx.Node, of: dict[fx.Node, tuple[int, ...]]) -> dict[int, int]:
    known: dict[int, int] = {}
    for argument in node.all_input_nodes:
        leaves = tensor_leaves(argument.meta.get("val"))
        known.update(zip(map(storage_identity, leaves), of.get(argument, ()), strict=True))
    return known


def _select(node: fx.Node, of: dict[fx.Node, tuple[int, ...]]) -> tuple[int, ...]:
    """Storages of ``value[i]``: the slice of the parent's leaves that the i-th item holds."""
    parent, index = node.args
    assert isinstance(parent, fx.Node)
    assert isinstance(index, int)
    items = list(parent.meta["val"])
    index = index % len(items)
    start = sum(len(tensor_leaves(item)) for item in items[:index])
    count = len(tensor_leaves(items[index]))
    return of[parent][start : start + count]
