"""Carries out the Plan's recompute decisions: clones forward nodes into the backward.

A value is recomputed right before the backward node that the Plan names, by a clone of its node
that reads clones or saved values; later backward nodes read the clone.  Views of saved values are
rebuilt the same way without being asked: they cost nothing, and only their base has to be kept.

Invariant: afterwards no backward node reads a forward node other than a saved one or an input, no
forward node reads a backward node, and every clone names its original in
``meta["recomputed_from"]``.

    forward:   a = gelu(x); y = mm(a, w)          a = gelu(x); y = mm(a, w)
    backward:  dw = mm(t(a), dy)            ->    a' = gelu(x); dw = mm(t'(a'), dy)

Recomputing what a saved value makes superfluous is not an error: dead clones are not made, because
clones are made on demand, from the uses backwards.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

from torch import fx

from fxzero.collectives import WAIT, is_gather
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.offload import FETCH_OF
from fxzero.storages import analyse

CLONE_OF = "recomputed_from"


def rematerialize_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Clones every node of ``context.decisions.recompute`` before the node it names."""
    rewrite = _Rewrite(graph, context)
    for node in list(graph.graph.nodes):
        if graph.is_backward(node) and node.op == "call_function":
            rewrite.visit(node)
    rewrite.finish()
    graph.graph.lint()
    return graph


class _Rewrite:
    def __init__(self, graph: TrainGraph, context: PassContext) -> None:
        self.graph = graph
        self.nodes = nodes = {node.name: node for node in graph.graph.nodes}
        storages = analyse(graph.graph.nodes)
        self.free = {n for n in nodes.values() if n.op == "call_function" and storages.is_view(n)}
        self.latest: dict[fx.Node, fx.Node] = {}
        self.unpacked: list[fx.Node] = []
        self.due: dict[str, list[fx.Node]] = defaultdict(list)
        for item in context.decisions.recompute:
            self.due[item.before].append(nodes[item.node])

    def visit(self, node: fx.Node) -> None:
        """Makes the clones due before ``node``, then lets it read the latest ones.

        A fetch is the latest instance of its value itself.
        """
        if FETCH_OF in node.meta:
            self._renew(self.nodes[node.meta[FETCH_OF]], node)
            return
        for original in self.due.pop(node.name, ()):
            self._clone(original, before=node)
        node.args = self._redirect(node.args, before=node)
        node.kwargs = self._redirect(node.kwargs, before=node)

    def finish(self) -> None:
        assert not self.due, f"recompute before unknown nodes: {sorted(self.due)}"
        (output,) = self.graph.graph.find_nodes(op="output")
        roles = self.graph.outputs
        results = [
            self._redirect(result, before=output)
            if role.kind == "gradient" and isinstance(result, fx.Node)
            else result
            for role, result in zip(roles, self.graph.results, strict=True)
        ]
        output.args = (type(output.args[0])(results),)
        for item in reversed(self.unpacked):
            if not item.users:
                self.graph.graph.erase_node(item)

    def _redirect(self, argument: Any, before: fx.Node) -> Any:
        return fx.map_arg(argument, lambda node: self._current(node, before))

    def _current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """What stands for forward ``node`` now: its latest clone, a rebuilt view, or itself."""
        if node in self.latest:
            return self.latest[node]
        if node in self.free and not self.graph.is_backward(node) and self._is_rebuilt(node):
            return self._clone(node, before)
        return node

    def _is_rebuilt(self, node: fx.Node) -> bool:
        """Views are; an item of a tuple, or what was waited for, only if its source came again."""
        if node.target not in (operator.getitem, WAIT):
            return True
        parent = node.args[0]
        return parent in self.free or parent in self.latest

    def _clone(self, node: fx.Node, before: fx.Node) -> fx.Node:
        graph = self.graph.graph
        args = self._redirect(node.args, before)
        kwargs = self._redirect(node.kwargs, before)
        with graph.inserting_before(before):
            clone = graph.create_node(
                node.op, node.target, args, kwargs, name=f"{node.name}_recomputed"
            )
        clone.meta = {**node.meta, CLONE_OF: node.name, "partitioner_tag": "is_backward"}
        self._renew(node, clone)
        self._unpack(node, before)
        return clone

    def _renew(self, node: fx.Node, instance: fx.Node) -> None:
        self.latest[node] = instance
        self._forget_views_of(node)

    def _unpack(self, node: fx.Node, before: fx.Node) -> None:
        """Takes a cloned tuple apart at once: the tuple would keep all its items alive.

        A cloned gather is waited for at once: buckets are made of gathers that are.
        """
        if is_gather(node):
            waits = [user for user in node.users if not self.graph.is_backward(user)]
            self.unpacked.append(self.latest[node])
            self.unpacked += [self._clone(wait, before) for wait in waits]
        if isinstance(node.meta["val"], (tuple, list)):
            for user in list(node.users):
                if user.target is operator.getitem and not self.graph.is_backward(user):
                    self.unpacked.append(self._clone(user, before))

    def _forget_views_of(self, node: fx.Node) -> None:
        """A new instance of a value makes rebuilt views of its older instance stale."""
        for user in node.users:
            if user in self.free and user in self.latest:
                del self.latest[user]
                self._forget_views_of(user)
