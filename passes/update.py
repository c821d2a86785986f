"""The optimizer updates each weight in the backward, so that gradients never exist all at once.

A gradient is handed to the optimizer where it is made and, over ranks, reduced; the update writes
the weight, and so it waits until the backward has read the weight for the last time.

Invariant: where ``context.updates``, each gradient of a parameter is read by its update alone, and
nothing reads a weight behind its update.

    dw = mm(t(x), dy)                          dw = mm(t(x), dy)
    dx = mm(dy, t(w))                          dx = mm(dy, t(w))
    ...                               ->       done = update(w, dw, "w")
    output:    [loss, dw]                      ...
                                               output:    [loss, done]
"""

from __future__ import annotations

from torch import fx

from fxzero.collectives import in_transfer
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.writer import Writer
from fxzero.storages import analyse
from fxzero.updating import UPDATE


def update_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Hands each parameter's gradient to the optimizer, and returns none."""
    if not context.updates:
        return graph
    parameters = {role: node for role, node in graph.pairs() if role.kind == "parameter"}
    results = list(graph.results)
    (output,) = graph.graph.find_nodes(op="output")
    for index, (result, value) in enumerate(graph.result_pairs()):
        if result.kind != "gradient" or not isinstance(value, fx.Node):
            continue
        if (of := result.of) is not None and of in parameters:
            weight = parameters[of]
            in_backward = value.op == "call_function" and graph.is_backward(value)
            writer = Writer(graph, value.next if in_backward else output)
            if weight.meta["val"].is_contiguous():
                value = writer.contiguous(value)
                value.meta["partitioner_tag"] = "is_backward"
            results[index] = writer.call(UPDATE, (weight, value, of.name))
            results[index].meta["partitioner_tag"] = "is_backward"
    output.args = (tuple(results),)
    postpone_updates(graph)
    graph.graph.lint()
    return graph


def postpone_updates(graph: TrainGraph) -> None:
    """Moves each update behind the last operator that reads its weight.

    A collective reads until it is waited for.
    """
    updates = [node for node in graph.graph.nodes if node.target is UPDATE]
    storages = analyse(graph.graph.nodes)
    last_read: dict[int, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is not UPDATE:
            for source in (*node.all_input_nodes, *in_transfer(node)):
                last_read.update((storage, node) for storage in storages.of[source])
    for node in updates:
        weight = node.args[0]
        assert isinstance(weight, fx.Node)
        (storage,) = storages.of[weight]
        reader = last_read.get(storage)
        if reader is not None and node < reader:
            reader.append(node)
