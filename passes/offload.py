"""Carries out the Plan's offload decisions: values wait for the backward in host memory.

A value is copied to the host right after it is made, and fetched right before the backward node
that the Plan names.  What reads the value in the backward still names the original: rematerialize,
which runs next, lets it read what was fetched or recomputed last.

Invariant: a fetch runs in the backward, reads the one host copy of the value that it names in
``meta["fetched_from"]``, and is like that value in shape, strides, dtype and device.

    forward:   a = gelu(x); y = mm(a, w)          a = gelu(x); h = to_host(a); y = mm(a, w)
    backward:  dw = mm(t(a), dy)            ->    a' = to_device(h); dw = mm(t'(a'), dy)
"""

from __future__ import annotations

from torch import fx

from fxzero import _torch
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.transfers import TO_DEVICE, TO_HOST

FETCH_OF = "fetched_from"


def offload_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Adds a host copy for each value that ``context.decisions.offload`` names, and its fetches."""
    nodes = {node.name: node for node in graph.graph.nodes}
    copies: dict[fx.Node, fx.Node] = {}
    for item in context.decisions.offload:
        node = nodes[item.node]
        if node not in copies:
            copies[node] = _send(graph.graph, node)
        _fetch(graph.graph, node, copies[node], before=nodes[item.before])
    graph.graph.lint()
    return graph


def _send(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_after(node):
        copy = graph.create_node("call_function", TO_HOST, (node,), name=f"{node.name}_on_host")
    mode = _torch.fake_mode_of([node.meta["val"]])
    assert mode is not None, f"{node} has no fake value"
    with mode:
        copy.meta = {**node.meta, "val": TO_HOST(node.meta["val"])}
    return copy


def _fetch(graph: fx.Graph, node: fx.Node, copy: fx.Node, before: fx.Node) -> None:
    args = (copy, node.meta["val"].device)
    with graph.inserting_before(before):
        fetch = graph.create_node("call_function", TO_DEVICE, args, name=f"{node.name}_fetched")
    # The value is the original's own: views of it are then views of what is fetched.
    fetch.meta = {**node.meta, FETCH_OF: node.name, "partitioner_tag": "is_backward"}
