"""Cuts a scheduled joint graph into the forward and the backward that run.

Whatever the backward reads from the forward becomes an extra output of the forward and an input of
the backward.  The order of nodes is kept: the executed order is the planned one.

Invariant: the forward returns [model outputs, saved values]; the backward takes [saved values,
existing gradients, tangents] and returns one gradient per input that has one.

    joint:     x, w, dy -> h = mm(x, w); y = relu(h); dh = ge(h, dy); dw = mm(t(x), dh) -> y, dw
    forward:   x, w -> h = mm(x, w); y = relu(h) -> y, h
    backward:  x, h, dy -> dh = ge(h, dy); dw = mm(t(x), dh) -> dw
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxzero import _torch
from fxzero.graph import InputRole, TrainGraph


@dataclass(frozen=True)
class Split:
    """A forward and a backward graph that run one after the other.

    Attributes:
        forward: takes parameters, buffers and inputs; returns model outputs, then saved values.
        backward: takes saved values, existing gradients, then tangents; returns gradients.
        inputs: roles of the forward's placeholders.
        output_count: how many of the forward's results are model outputs (and new values of
            buffers that somebody else will write).
        saved: names of the forward nodes (or placeholders) behind the backward's first inputs.
        accumulated: for each existing gradient, its parameter's position among the inputs.
        tangents: model output positions behind the backward's last inputs.
        gradients: for each placeholder of the forward, its position among the backward's results,
            or None.
        mutated: names of the buffers that the forward updates.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    inputs: tuple[InputRole, ...]
    output_count: int
    saved: tuple[str, ...]
    accumulated: tuple[int, ...]
    tangents: tuple[int, ...]
    gradients: tuple[int | None, ...]
    mutated: tuple[str, ...]

    @property
    def input_gradients(self) -> list[int]:
        """Positions of the gradients of inputs, in their order; not of parameters."""
        pairs = zip(self.inputs, self.gradients, strict=True)
        return [at for role, at in pairs if role.kind == "input" and at is not None]

    def backward_inputs(self) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """The backward's placeholders: saved values, existing gradients, tangents."""
        nodes = list(self.backward.graph.find_nodes(op="placeholder"))
        saved, rest = len(self.saved), len(self.saved) + len(self.accumulated)
        return nodes[:saved], nodes[saved:rest], nodes[rest:]


def partition(graph: TrainGraph) -> Split:
    """Splits a graph on which every pass has run."""
    placeholders = list(graph.pairs())
    tangents = [(role, node) for role, node in placeholders if role.kind == "tangent"]
    existing = [(role, node) for role, node in placeholders if role.kind == "gradient"]
    kinds = ("tangent", "gradient")
    arguments = [(role, node) for role, node in placeholders if role.kind not in kinds]
    body = [n for n in graph.graph.nodes if n.op in ("call_function", "get_attr")]
    backward_body = [n for n in body if _runs_in_backward(graph, n)]
    forward_body = [n for n in body if not _runs_in_backward(graph, n)]
    outputs = [v for role, v in graph.result_pairs() if role.kind in ("output", "mutation")]
    gradients = {
        role.of: value
        for role, value in graph.result_pairs()
        if role.kind == "gradient" and value is not None
    }
    given = [node for _, node in (*existing, *tangents)]
    saved = _read_from_outside(backward_body, list(gradients.values()), given)
    positions = {role: index for index, role in enumerate(gradients)}
    parameters = {r.name: i for i, (r, _) in enumerate(arguments) if r.kind == "parameter"}
    module, nodes = graph.module, [node for _, node in arguments]
    return Split(
        forward=extract(module, nodes, forward_body, [*outputs, *saved]),
        backward=extract(module, [*saved, *given], backward_body, list(gradients.values())),
        inputs=tuple(role for role, _ in arguments),
        output_count=len(outputs),
        saved=tuple(node.name for node in saved),
        accumulated=tuple(parameters[role.name] for role, _ in existing),
        tangents=tuple(role.index for role, _ in tangents),
        gradients=tuple(positions.get(role) for role, _ in arguments),
        mutated=tuple(role.name for role, node in arguments if any(map(is_write, node.users))),
    )


def is_write(node: fx.Node) -> bool:
    """Whether the node writes a new value into a buffer."""
    return node.target is torch.ops.aten.copy_.default


def _runs_in_backward(graph: TrainGraph, node: fx.Node) -> bool:
    return graph.is_backward(node)


def _read_from_outside(
    body: Iterable[fx.Node], results: Iterable[fx.Node], own_inputs: list[fx.Node]
) -> list[fx.Node]:
    """Nodes that ``body`` or ``results`` read and ``body`` does not make, in order of first use."""
    own = {*own_inputs, *body}
    found: dict[fx.Node, None] = {}
    for node in body:
        found.update((source, None) for source in node.all_input_nodes if source not in own)
    found.update((node, None) for node in results if node not in own)
    return list(found)


def extract(
    module: fx.GraphModule, inputs: list[fx.Node], body: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    """A part of a graph, with nodes of the same names, as a graph of its own.

    Args:
        inputs: nodes in whose places it has placeholders, in order.
        body: what it runs, in order.
        results: what it returns.
    """
    extracted = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = extracted.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in body:
        copies[node] = extracted.node_copy(node, copies.__getitem__)
    extracted.output(tuple(copies[node] for node in results))
    return _torch.make_graph_module(module, extracted)
