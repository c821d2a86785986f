"""Collectives run while operators do: they start early and are waited for late.

A gather starts when one before it is first used, and runs beside what that one was gathered for.
A reduction is waited for when one behind it starts, and runs beside the operators that make the
gradients in between.  Forward and backward keep to themselves.

Invariant: of gathers, and of reductions over one dimension of the mesh, at most
``context.decisions.in_flight`` are neither waited for nor the next to be.  The order in which
collectives start depends on the graph alone: it is the same on all ranks.

    g1 = all_gather(w1); u1 = wait(g1)              g1 = all_gather(w1); u1 = wait(g1)
    y = mm(x, u1)                                   g2 = all_gather(w2)
    g2 = all_gather(w2); u2 = wait(g2)       ->     y = mm(x, u1)
    z = mm(y, u2)                                   u2 = wait(g2); z = mm(y, u2)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection

import torch
from torch import fx

from fxzero.collectives import group_of, is_gather, is_reduction, waits_of
from fxzero.graph import TrainGraph
from fxzero.messages import WRITE
from fxzero.passes.context import PassContext

_ATEN = torch.ops.aten
# What is done to parts of parameters before they are gathered.
_PREPARE = (_ATEN._to_copy.default, _ATEN.view.default, _ATEN.cat.default, WRITE)


def overlap_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Lets ``context.decisions.in_flight`` collectives of a kind run beside operators."""
    count = context.decisions.in_flight
    if count:
        for backward in (False, True):
            _start_early(graph, count, backward)
        _wait_late(graph, count)
        graph.graph.lint()
    return graph


def _start_early(graph: TrainGraph, count: int, backward: bool) -> None:
    """Moves the starts of gathers, and what prepares their parts, to earlier places."""
    nodes = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and graph.is_backward(node) == backward
    ]
    position = {node: index for index, node in enumerate(nodes)}
    gathers = [node for node in nodes if is_gather(node)]
    first_waits = [min(waits_of(gather), key=position.__getitem__) for gather in gathers]
    # The first ones start together.
    for gather, before in zip(gathers[1:], [*gathers[: count - 1], *first_waits], strict=False):
        sources = _preparation(gather, position)
        if all(source.target in _PREPARE for source in sources):
            before.append(gather)
            for source in sorted(sources, key=position.__getitem__):
                if gather < source:
                    gather.prepend(source)


def _preparation(gather: fx.Node, among: Collection[fx.Node]) -> set[fx.Node]:
    """What has to run before a gather starts."""
    found: set[fx.Node] = set()
    pending = [gather]
    while pending:
        new = {source for source in pending.pop().all_input_nodes if source in among} - found
        found |= new
        pending += new if all(source.target in _PREPARE for source in new) else ()
    return found


def _wait_late(graph: TrainGraph, count: int) -> None:
    """Moves the waits for reductions, and what follows from them, to later places."""
    (output,) = graph.graph.find_nodes(op="output")
    nodes = list(graph.graph.nodes)
    order = _Order(count, {n for n in nodes if is_reduction(n) and graph.is_backward(n)})
    for node in nodes:
        if node is not output:
            order.take(node)
    for node in order.finish():
        output.prepend(node)


class _Order:
    """Nodes in a new order: what depends on a reduction stands where that is waited for."""

    def __init__(self, count: int, reductions: Collection[fx.Node]) -> None:
        self.count = count
        self.reductions = reductions
        self.written: dict[fx.Node, None] = {}
        self.put_off: list[fx.Node] = []
        self.running: dict[str, deque[fx.Node]] = defaultdict(deque)

    def take(self, node: fx.Node) -> None:
        """Writes the node, or puts it off if it depends on a reduction that is still running."""
        if any(s not in self.written or self._runs(s) for s in node.all_input_nodes):
            self.put_off.append(node)
            return
        if node in self.reductions:
            running = self.running[group_of(node)]
            if len(running) == self.count:
                self._wait_for_first(running)
            running.append(node)
        self.written[node] = None

    def finish(self) -> list[fx.Node]:
        """All nodes, once everything that is running has been waited for."""
        while any(self.running.values()):
            self._wait_for_first(next(filter(None, self.running.values())))
        return list(self.written)

    def _runs(self, node: fx.Node) -> bool:
        return node in self.reductions and node in self.running[group_of(node)]

    def _wait_for_first(self, running: deque[fx.Node]) -> None:
        running.popleft()
        again, self.put_off = self.put_off, []
        for node in again:
            self.take(node)
