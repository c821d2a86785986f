"""Which values were derived from their arguments once, so that the law need not do it again.

Passes leave most of a graph as it was, and copies of a graph share its values.  What is remembered
is that an operator, called as its arguments read, made these very tensors of those:

    mm = aten.mm(x, w)        derived in the first check
    mm = aten.mm(x, w)        after a pass, or in a copy: the same
    mm = aten.mm(x, v)        derived again

Invariant: nothing is kept alive.  Tensors are known by weak references, which a later tensor at
the same place in memory is not.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

# By the first tensor of a node's value: how it was called, and the tensors of all values.
_Known = dict[tuple[Any, ...], list[weakref.ref[torch.Tensor]]]
_known: Any = WeakIdKeyDictionary()


def is_known(node: fx.Node) -> bool:
    """Whether a node that was remembered had this operator, these arguments and this value."""
    call, tensors = _described(node)
    if not tensors or tensors[0] not in _known:
        return False
    known: _Known = _known[tensors[0]]
    found = known.get(call, [])
    return len(found) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(found, tensors, strict=True)
    )


def remember(node: fx.Node) -> None:
    """Says that the node's value is what its operator derives from its arguments."""
    call, tensors = _described(node)
    if tensors:
        known: _Known = _known.setdefault(tensors[0], {})
        known[call] = [weakref.ref(tensor) for tensor in tensors]


def _described(node: fx.Node) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The operator and all that is no tensor, and the tensors, the node's own first."""
    tensors: list[torch.Tensor] = []
    rest = []
    for source in (node, *node.all_input_nodes):
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            continue
        leaves, structure = pytree.tree_flatten(value)
        tensors += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = [None if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
        rest.append((source.name, str(structure), str(others)))
    return (node.target, str(node.args), str(node.kwargs), *rest), tensors
