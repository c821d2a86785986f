"""Passes that go wrong on purpose, planted in a compiled model before it makes its graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxzero import randomness
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.pipeline import PASSES, PREPARATION, Pass, PassList
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.updating import UPDATE

Spoil = Callable[[TrainGraph], None]


def plant(model: Any, name: str, spoil: Spoil) -> Any:
    """The compiled model with a pass that spoils the graphs that it leaves from now on."""

    def spoilt(item: Pass) -> Pass:
        def function(graph: TrainGraph, context: PassContext) -> TrainGraph:
            made = item.function(graph, context)
            spoil(made)
            return made

        return replace(item, function=function) if item.name == name else item

    passes = PassList(tuple(map(spoilt, PREPARATION)), tuple(map(spoilt, PASSES)))
    state = vars(model)["_fxzero"]
    state.options = replace(state.options, passes=passes)
    if state.pipeline is not None:
        state.pipeline.options = replace(state.pipeline.options, passes=passes)
    return model


def scale_gradient(of: str, factor: float = 1.5) -> Spoil:
    """The gradient of a parameter is multiplied where it is returned, or given to the optimizer."""

    def spoil(graph: TrainGraph) -> None:
        (output,) = graph.graph.find_nodes(op="output")
        results = list(graph.results)
        for place, (role, node) in enumerate(graph.result_pairs()):
            if role.kind != "gradient" or role.of is None or role.of.name != of:
                continue
            updates = node.target is UPDATE
            gradient = node.args[1] if updates else node
            with graph.graph.inserting_before(node if updates else output):
                scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (gradient, factor))
            scaled.meta = dict(gradient.meta)
            if updates:
                node.update_arg(1, scaled)
            else:
                results[place] = scaled
        output.args = (tuple(results),)

    return spoil


def drop_accumulation(of: str) -> Spoil:
    """The gradient of a parameter is returned without what existed."""

    def spoil(graph: TrainGraph) -> None:
        (output,) = graph.graph.find_nodes(op="output")
        results = list(graph.results)
        for place, (role, node) in enumerate(graph.result_pairs()):
            if role.kind != "gradient" or role.of is None or role.of.name != of:
                continue
            if node.target is torch.ops.aten.add_.Tensor:
                results[place] = node.args[1]
                output.args = (tuple(results),)
                graph.graph.erase_node(node)

    return spoil


def change_constant(graph: TrainGraph) -> None:
    """The first recomputed product with a number gets another number."""
    node = next(
        node
        for node in graph.graph.nodes
        if CLONE_OF in node.meta
        and node.target is torch.ops.aten.mul.Tensor
        and isinstance(node.args[1], float)
    )
    node.update_arg(1, 1.25 * node.args[1])


def draw_anew(graph: TrainGraph) -> None:
    """The first recomputed random operator draws new numbers."""
    node: fx.Node = next(n for n in graph.graph.nodes if n.target is randomness.draw_again)
    _, target, *args = node.args
    assert callable(target)
    node.target = target
    node.args = tuple(args)
