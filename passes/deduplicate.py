"""Equal forward operations on equal values run once.

Models repeat themselves: every attention layer turns the same mask into the same bias, every layer
asks for the same table of positions.  What the backward reads of these would be saved once for each
layer.

What is merged lives on from its first use to its last in the forward, where nothing is recomputed:
for large values that can cost more than it spares, so the planner tries both.

Invariant: no two forward nodes with the same operator, arguments and checkpoint region are left,
but for random ones, model outputs (they own their memory) and values that the user named.

    forward:   b1 = where(m, 0, -inf); y1 = attention(q1, b1)        b1 = where(m, 0, -inf)
               b2 = where(m, 0, -inf); y2 = attention(q2, b2)   ->   y1 = attention(q1, b1)
                                                                     y2 = attention(q2, b1)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.replay_randomness import is_random
from fxzero.storages import analyse


def deduplicate_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Replaces each repeated forward node by the first of its kind."""
    (output,) = graph.graph.find_nodes(op="output")
    storages = analyse(graph.graph.nodes)
    owned = {storage for node in output.all_input_nodes for storage in storages.of[node]}
    first: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.graph.nodes):
        mine = set(storages.of.get(node, ()))
        if graph.is_backward(node) or mine & owned or not _may_merge(node):
            continue
        kept = first.setdefault(_kind(node), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)
    graph.graph.lint()
    return graph


def _may_merge(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target.namespace != "aten" or "empty" in target.__name__ or is_random(node):
        return False
    named = "fxzero_name" in (node.meta.get("custom") or {})
    return not named and torch.Tag.nondeterministic_bitwise not in target.tags


def _kind(node: fx.Node) -> tuple[object, ...]:
    """Equal for nodes that compute the same; arguments print as their nodes' names."""
    region = (node.meta.get("custom") or {}).get("fxzero_checkpoint")
    return node.target, repr(node.args), repr(sorted(node.kwargs.items())), region
