"""Recomputed random operators replay the forward's draw.

For each random operator with clones, the forward copy also returns the generator's state from
before the draw, and each clone runs under that state.  The state is saved for the backward like
any value.

Invariant: a random operator drawn once in the forward draws the same numbers in every clone, and
the generator ends where it would without recompute.

    forward:   m = dropout(x)                s, m = draw(dropout, x)
    backward:  m' = dropout(x')        ->    m' = draw_again(s, dropout, x')
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero import _torch, randomness
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.storages import arguments_by_name


def replay_randomness_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Shares one saved generator state between a random operator and its clones."""
    clones: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if CLONE_OF in node.meta and is_random(node):
            clones[node.meta[CLONE_OF]].append(node)
    originals = [n for n in graph.graph.nodes if n.name in clones and CLONE_OF not in n.meta]
    for original in originals:
        state = _save_state(graph.graph, original, context)
        for clone in clones[original.name]:
            _run_with_state(graph.graph, clone, state)
    graph.graph.lint()
    return graph


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers; attention without dropout does not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return bool(arguments_by_name(node).get("dropout_p", True))


def rng_state_bytes(device: str) -> int:
    """Bytes of one saved generator state; the state of a CUDA generator lives on the host."""
    return torch.get_rng_state().numel() if device == "cpu" else 0


def _save_state(graph: fx.Graph, node: fx.Node, context: PassContext) -> fx.Node:
    """Replaces ``node`` by its state-saving form; returns the state node."""
    state_bytes = torch.get_rng_state().numel() if context.device == "cpu" else 16
    value = node.meta["val"]
    fake_mode = _torch.fake_mode_of([value] if isinstance(value, torch.Tensor) else list(value))
    assert fake_mode is not None, f"{node} has no fake value"
    with fake_mode:
        state_value = torch.empty(state_bytes, dtype=torch.uint8, device="cpu")
    with graph.inserting_before(node):
        pair = _call(graph, randomness.draw, node.target, *node.args, **node.kwargs)
        state = graph.call_function(operator.getitem, (pair, 0))
        result = graph.call_function(operator.getitem, (pair, 1))
    pair.meta = {**node.meta, "val": (state_value, value)}
    state.meta = {**node.meta, "val": state_value, "rng_state": True}
    result.meta = dict(node.meta)
    name = node.name
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    result.name = name
    return state


def _run_with_state(graph: fx.Graph, clone: fx.Node, state: fx.Node) -> None:
    with graph.inserting_before(clone):
        replay = _call(
            graph, randomness.draw_again, state, clone.target, *clone.args, **clone.kwargs
        )
    replay.meta = dict(clone.meta)
    clone.replace_all_uses_with(replay)
    graph.erase_node(clone)


def _call(graph: fx.Graph, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    return graph.call_function(function, args, kwargs)
