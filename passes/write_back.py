"""Buffer updates become writes at the end of the forward.

A traced graph returns the new values of buffers that the model mutates (running statistics,
counters).  This pass writes them with ``copy_`` after the last forward node, and drops them from
the outputs.  A buffer whose old value the backward reads is cloned before it is written.

Invariant: afterwards no output is a mutation, and each buffer is written once, after its last
read.

    forward:  mean' = mul_add(mean, x)            mean' = mul_add(mean, x); copy_(mean, mean')
    output:   [loss, mean', grads]          ->    [loss, grads]
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext


def write_back_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Turns every output of kind "mutation" into a write at the end of the forward.

    Where somebody else writes (``context.writes_buffers`` is False), old values are kept too.
    """
    placeholder_of = dict(graph.pairs())
    first_backward = first_backward_node(graph)
    for role, value in graph.result_pairs():
        if role.kind == "mutation":
            assert role.of is not None
            target = placeholder_of[role.of]
            _keep_old_value(graph, target, first_backward)
            if not context.writes_buffers:
                continue
            with graph.graph.inserting_before(first_backward):
                write = graph.graph.call_function(torch.ops.aten.copy_.default, (target, value))
            write.meta = {**value.meta, "val": target.meta["val"], "partitioner_tag": "is_forward"}
    kept = [
        (role, value)
        for role, value in graph.result_pairs()
        if role.kind != "mutation" or not context.writes_buffers
    ]
    (output,) = graph.graph.find_nodes(op="output")
    output.args = (tuple(value for _, value in kept),)
    graph.graph.lint()
    return replace(graph, outputs=tuple(role for role, _ in kept))


def first_backward_node(graph: TrainGraph) -> fx.Node:
    """The first operation of the backward, or the output node if there is none."""
    nodes: list[fx.Node] = list(graph.graph.nodes)
    return next(
        node
        for node in nodes
        if node.op == "output" or (node.op == "call_function" and graph.is_backward(node))
    )


def _keep_old_value(graph: TrainGraph, buffer: fx.Node, before: fx.Node) -> None:
    """Backward reads of a buffer that will be written read a copy made before."""
    readers = [user for user in buffer.users if graph.is_backward(user)]
    if not readers:
        return
    with graph.graph.inserting_before(before):
        copy = graph.graph.call_function(torch.ops.aten.clone.default, (buffer,))
    value = buffer.meta["val"]
    with value.fake_mode:
        copy.meta = {"val": value.clone(), "partitioner_tag": "is_forward"}
    for reader in readers:
        reader.replace_input_with(buffer, copy)
