"""Gradients are added to those that exist as soon as they are made.

The backward is one node to autograd, which would add what it returns when all of it has run: new
gradients and old ones would be there at once.  Here each new one is freed where it is made, as
when autograd runs operators one by one.

Invariant: where ``context.accumulates``, each gradient of a parameter is the sum that is left in
the placeholder of the one before, and nothing else reads that placeholder.

    w [8, 4]; ...; dw = mm(...)          w [8, 4]; w_grad [8, 4]; ...; dw = mm(...)
    output:    [loss, dw]         ->     s = add_(w_grad, dw)
                                         output:    [loss, s]
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fxzero import _torch
from fxzero.graph import InputRole, TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.shard import WHOLE
from fxzero.passes.writer import Writer
from fxzero.storages import is_dense

_ADD = torch.ops.aten.add_.Tensor


def accumulate_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Adds each parameter's gradient to the one that exists."""
    if not context.accumulates:
        return graph
    parameters = {role: node for role, node in graph.pairs() if role.kind == "parameter"}
    results, inputs = list(graph.results), list(graph.inputs)
    (output,) = graph.graph.find_nodes(op="output")
    for index, (result, value) in enumerate(graph.result_pairs()):
        if result.kind != "gradient" or not isinstance(value, fx.Node):
            continue
        if (of := result.of) is not None and of in parameters:
            existing = _add_placeholder(graph, parameters[of], value)
            inputs.append(InputRole("gradient", of.name))
            made_in_backward = value.op == "call_function" and graph.is_backward(value)
            writer = Writer(graph, value.next if made_in_backward else output)
            results[index] = writer.call(_ADD, (existing, value))
            results[index].meta["partitioner_tag"] = "is_backward"
    output.args = (tuple(results),)
    graph.graph.lint()
    return replace(graph, inputs=tuple(inputs))


def _add_placeholder(graph: TrainGraph, parameter: fx.Node, gradient: fx.Node) -> fx.Node:
    """A placeholder behind the others, with the layout that autograd gives a gradient."""
    made, like = gradient.meta["val"], parameter.meta["val"]
    if like.shape != made.shape:  # not reduced yet
        like = parameter.meta[WHOLE]
    mode = _torch.fake_mode_of([made])
    assert mode is not None
    with mode:
        value = torch.empty(made.shape, dtype=made.dtype, device=made.device)
        if is_dense(like):
            value = value.as_strided(like.shape, like.stride())
    with graph.graph.inserting_after(graph.placeholders[-1]):
        node = graph.graph.placeholder(f"{parameter.name}_grad")
    node.meta = {"val": value}
    return node
