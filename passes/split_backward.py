"""Cuts the backward of a pipeline stage in two: gradients of its inputs, then those of its weights.

The stage before waits for the gradients of the inputs; nobody waits for those of the weights, which
zero-bubble schedules compute where a rank would be idle (Qi et al., ICLR 2024).  Whatever the
weight part reads of what the input part makes is handed over: storages, once each, as views of them
are made again.

A fused operator that computes both kinds runs twice, under masks, if that lets the weight part do
matrix products or convolutions.  Those of norms stay whole: what they give the weights is small,
while their arguments are as large as activations and would all be held.

Invariant: every other operator but views runs once, in its part at its place in the old order, and
all results, writes and random draws are those of the backward.

    backward:     x, h, w, dy -> dh = ge(dy, h); dx = mm(dh, w); dw = mm(t(dh), x) -> dx, dw
    input part:   h, w, dy    -> dh = ge(dy, h); dx = mm(dh, w) -> dx, dh
    weight part:  dh, x       -> dw = mm(t(dh), x) -> dw
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxzero import _torch
from fxzero.collectives import is_collective, waits_of
from fxzero.cost import count_flops, makes_view
from fxzero.passes.partition import extract
from fxzero.passes.replay_randomness import is_random
from fxzero.storages import analyse, written_arguments

# Stands for the random generators among storages: every draw writes to it.
_GENERATORS = -1


@dataclass(frozen=True)
class BackwardSplit:
    """A backward as two graphs that run one after the other.

    The input part is called with the backward's arguments at ``input_takes``, the weight part with
    what was handed over and those at ``weight_takes``.  One result of the input part may be an
    early gradient and handed over too: nobody may write to it in between.

    Attributes:
        input_part: returns the gradients that were asked for early, then what it hands over.
        weight_part: returns the other gradients.
        input_takes: positions among the backward's placeholders.
        weight_takes: positions among the backward's placeholders, held until the weight part runs.
        input_returns: positions among the backward's results.
        weight_returns: positions among the backward's results.
        handed: names of the nodes of the input part behind the weight part's first placeholders.
    """

    input_part: fx.GraphModule
    weight_part: fx.GraphModule
    input_takes: tuple[int, ...]
    weight_takes: tuple[int, ...]
    input_returns: tuple[int, ...]
    weight_returns: tuple[int, ...]
    handed: tuple[str, ...]


def split_backward(backward: fx.GraphModule, early: Collection[int]) -> BackwardSplit:
    """Splits a backward, which stays as it is.

    Args:
        early: positions of the results that are gradients of the stage's inputs; without any, the
            input part is empty.
    """
    module = _torch.copy_module(backward)
    (output,) = module.graph.find_nodes(op="output")
    results = list(output.args[0])
    input_returns = tuple(sorted(early))
    weight_returns = tuple(i for i in range(len(results)) if i not in input_returns)
    asked, others = ([results[i] for i in part] for part in (input_returns, weight_returns))
    output.args = (tuple(asked),)
    _split_fused(output)
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    body = [n for n in module.graph.nodes if n.op in ("call_function", "get_attr")]
    needed = _needed(output)
    rest = _rest(body, needed, others)
    read = {*others, *(source for node in rest for source in node.all_input_nodes)} - rest
    given = [node for node in placeholders if node in needed]
    taken = [node for node in placeholders if node in read]
    handed = [node for node in body if node in read]
    return BackwardSplit(
        input_part=extract(module, given, [n for n in body if n in needed], [*asked, *handed]),
        weight_part=extract(module, [*handed, *taken], [n for n in body if n in rest], others),
        input_takes=tuple(map(placeholders.index, given)),
        weight_takes=tuple(map(placeholders.index, taken)),
        input_returns=input_returns,
        weight_returns=weight_returns,
        handed=tuple(node.name for node in handed),
    )


def _split_fused(output: fx.Node) -> None:
    """Calls operators twice of whose results the graph's output needs some and not others.

    Each mask spares a convolution half of its time.  Batch and group norms need for the input's
    gradient all that the weights' are made of, and on the CPU of torch 2.13 the backward of a
    channels-last group norm crashes under a mask without the first.
    """
    needed = _needed(output)
    for node in list(output.graph.nodes):
        position = _mask_position(node)
        later = [item for item in node.users if needed.isdisjoint(item.users)]
        if position is None or len(later) == len(node.users):
            continue
        with output.graph.inserting_after(node):
            copy = output.graph.node_copy(node)
        _restrict(copy, position, {item.args[1] for item in later})
        if count_flops(copy):
            _restrict(node, position, {item.args[1] for item in node.users if item not in later})
            for item in later:
                item.replace_input_with(node, copy)
        else:
            output.graph.erase_node(copy)


def _mask_position(node: fx.Node) -> int | None:
    """Where an operator with one tensor for each item of its ``output_mask`` takes the mask."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    names = [argument.name for argument in schema.arguments]
    if "output_mask" not in names or any(str(r.type) != "Tensor" for r in schema.returns):
        return None
    return names.index("output_mask")


def _restrict(node: fx.Node, position: int, items: Collection[object]) -> None:
    """Lets the operator compute these items only."""
    node.update_arg(position, [index in items for index in range(len(node.meta["val"]))])
    value = tuple(v if index in items else None for index, v in enumerate(node.meta["val"]))
    node.meta = {**node.meta, "val": value}


def _needed(output: fx.Node) -> set[fx.Node]:
    """The output and all that must run before it, or in the same part as something that must."""
    needs = _requirements(output.graph)
    found, pending = {output}, [output]
    while pending:
        new = needs[pending.pop()] - found
        found |= new
        pending += new
    return found


def _requirements(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node, what it reads, what it must run after, and what has to be in its part.

    The first of two nodes that touch one storage runs first if one of them writes to it.  In its
    part are all items of a tuple, which cannot be handed over, and the waits for a collective.
    """
    storages = analyse(graph.nodes)
    needs: dict[fx.Node, set[fx.Node]] = {}
    writer: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        needs[node] = set(node.all_input_nodes)
        touched = {s for n in (node, *node.all_input_nodes) for s in storages.of.get(n, ())}
        written = {s for n in written_arguments(node) for s in storages.of[n]}
        if is_random(node):
            written.add(_GENERATORS)
        needs[node].update(writer[s] for s in touched | written if s in writer)
        for storage in written:
            needs[node].update(readers.pop(storage, ()))
            writer[storage] = node
        for storage in touched - written:
            readers[storage].append(node)
        if isinstance(node.meta.get("val"), (tuple, list)):
            needs[node].update(node.users)
        if is_collective(node):
            needs[node].update(waits_of(node))
    return needs


def _rest(
    body: list[fx.Node], needed: Collection[fx.Node], results: Iterable[fx.Node]
) -> set[fx.Node]:
    """The nodes that are not needed, with the views and constants among the others they read."""
    found: set[fx.Node] = set()
    read = set(results)
    for node in reversed(body):
        if node not in needed or (node in read and _is_made_again(node)):
            found.add(node)
            read.update(node.all_input_nodes)
    return found


def _is_made_again(node: fx.Node) -> bool:
    """Whether it costs nothing to make the value twice."""
    if node.target is operator.getitem:
        return all(map(_is_made_again, node.all_input_nodes))
    target = node.target
    return node.op == "get_attr" or (
        isinstance(target, torch._ops.OpOverload) and makes_view(target)
    )
