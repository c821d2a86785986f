"""Writes calls into a graph that is being rewritten, with the fake values that they make.

    writer = Writer(graph, before=node)
    gathered = writer.call(ALL_GATHER, (part, 4, "dp"))

What is written has the direction and the origin of the place where it stands, or of another node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero import _torch
from fxzero.collectives import WAIT
from fxzero.graph import TrainGraph
from fxzero.storages import storage_identity, tensor_leaves

_ATEN = torch.ops.aten
_ORIGIN = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack")


class Writer:
    """Writes before one place in a graph.

    Args:
        like: the node whose origin and direction the calls have; None: that of the place.
    """

    def __init__(self, graph: TrainGraph, before: fx.Node, like: fx.Node | None = None) -> None:
        self.graph = graph.graph
        self.before = before
        like = before if like is None else like
        self.meta = {key: like.meta[key] for key in _ORIGIN if key in like.meta}
        backward = graph.is_backward(like)
        self.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"

    def call(
        self, target: Any, args: tuple[Any, ...], name: str | None = None, **options: Any
    ) -> fx.Node:
        """Calls a function of nodes and constants."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("call_function", target, args, options, name=name)
        node.meta = {**self.meta, "val": derived(node)}
        return node

    def wait(self, collective: fx.Node) -> fx.Node:
        """Waits for a collective, whose value it returns."""
        node = self.call(WAIT, (collective,))
        node.meta["val"] = collective.meta["val"]  # it returns its argument
        return node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The value in a dtype; the node itself if it has it."""
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(_ATEN._to_copy.default, (node,), dtype=dtype)

    def contiguous(self, node: fx.Node) -> fx.Node:
        """The value in row-major order; the node itself if it has it."""
        if node.meta["val"].is_contiguous():
            return node
        return self.call(_ATEN.clone.default, (node,), memory_format=torch.contiguous_format)


def derived(node: fx.Node) -> Any:
    """The node's fake value, from those of its arguments."""
    given: Any = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    args, kwargs = given
    mode = _torch.fake_mode_of(tensor_leaves(given))
    assert mode is not None, f"{node} reads no fake value"
    assert callable(node.target)
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)


def renew_views(node: fx.Node, stale: int) -> None:
    """Lets the values of all views of ``node`` be views of its value, and not of what it was."""
    for user in list(node.users):
        leaves = tensor_leaves(user.meta.get("val"))
        if user.op == "call_function" and any(storage_identity(t) == stale for t in leaves):
            user.meta = {**user.meta, "val": derived(user)}
            renew_views(user, stale)
