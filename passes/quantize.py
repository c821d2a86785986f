"""Ranks send one another numbers of 8 or 4 bits: weights when gathered, gradients when reduced.

A gather moves codes with a scale for up to 256 neighbours, and what arrives is turned into floats
again (ZeRO++'s qwZ).  A reduce-scatter becomes an all-to-all of codes, added up as float32 where
they arrive, so each number is rounded once however many ranks there are (qgZ; Wang et al., 2023).
Only large collectives of float32 and bfloat16 change; notes of the plan say which did not.

Results change, so it is done only where ``context.sharding`` asks for it.

Invariant: what arrives differs from what was sent by no more than ``quantization`` says, and every
rank computes with the same weights.

    g = all_gather(w, 4, "dp"); u = wait(g)      m = write_message(w, 1, "int8")
                                            ->   g = all_gather(m, 4, "dp"); a = wait(g)
                                                 u = view(read_message(a, 4, ...), ...)
"""

from __future__ import annotations

import torch
from torch import fx

from fxzero import messages
from fxzero.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    WAIT,
    group_of,
    ranks_of,
)
from fxzero.graph import TrainGraph
from fxzero.mesh import Sharding
from fxzero.passes.context import PassContext
from fxzero.passes.writer import Writer, renew_views
from fxzero.sharding import padded_rows
from fxzero.storages import storage_identity
from fxzero.units import format_bytes

_VIEW = torch.ops.aten.view.default


def quantize_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Sends weights and gradients as ``context.sharding`` says."""
    weights, gradients = context.sharding.send_weights, context.sharding.send_gradients
    for node in list(graph.graph.nodes):
        if node.target is ALL_GATHER and weights and _is_worth_it(node):
            _gather(graph, node, weights)
        elif node.target is REDUCE_SCATTER and gradients and _is_worth_it(node):
            _scatter(graph, node, gradients)
    graph.graph.lint()
    return graph


def what_is_sent(graph: TrainGraph, sharding: Sharding) -> list[str]:
    """Notes: how much of what ranks exchange is quantized, and how much is not."""
    notes = []
    if kind := sharding.send_weights:
        transfers = _transfers(graph, (ALL_GATHER,)) + _gathered_once(graph, sharding)
        notes.append(_note("weights", kind, transfers))
    if kind := sharding.send_gradients:
        transfers = _transfers(graph, (REDUCE_SCATTER, ALL_TO_ALL, ALL_REDUCE))
        notes.append(_note("gradients", kind, transfers))
    return notes


def _transfers(graph: TrainGraph, targets: tuple[object, ...]) -> list[tuple[bool, int]]:
    """Of each collective: whether codes travel, and the bytes of all parts."""
    nodes = [node for node in graph.graph.nodes if node.target in targets]
    return [
        (
            _source(node).target is messages.WRITE,
            max(node.meta["val"].nbytes, _source(node).meta["val"].nbytes),
        )
        for node in nodes
    ]


def _gathered_once(graph: TrainGraph, sharding: Sharding) -> list[tuple[bool, int]]:
    """The same for parameters that a step gathers for all of its micro-batches."""
    found = []
    for role, node in graph.pairs():
        if role.kind == "gathered":
            value, shards = node.meta["val"], sharding.shards
            part = padded_rows(value.shape[0], shards) * (value.numel() // value.shape[0])
            narrow = messages.is_worth_it(part, value.dtype)
            size = messages.message_bytes(part, str(sharding.send_weights)) * shards
            found.append((narrow, size if narrow else value.nbytes))
    return found


def _note(name: str, kind: str, transfers: list[tuple[bool, int]]) -> str:
    narrow = [size for is_narrow, size in transfers if is_narrow]
    plain = sum(size for is_narrow, size in transfers if not is_narrow)
    return (
        f"{len(narrow)} of {len(transfers)} {name} travel as {kind}, {format_bytes(sum(narrow))}; "
        f"the others, {format_bytes(plain)}, as they are"
    )


def _is_worth_it(collective: fx.Node) -> bool:
    value, source = collective.meta["val"], _source(collective).meta["val"]
    return messages.is_worth_it(min(value.numel(), source.numel()), source.dtype)


def _source(collective: fx.Node) -> fx.Node:
    """What a collective moves."""
    (source,) = collective.all_input_nodes
    return source


def _gather(graph: TrainGraph, gather: fx.Node, kind: str) -> None:
    source, (_, ranks, group) = _source(gather), gather.args
    (wait,) = gather.users
    part, writer = source.meta["val"], Writer(graph, gather)
    message = writer.call(messages.WRITE, (source, 1, kind))
    arrived = writer.wait(writer.call(ALL_GATHER, (message, ranks, group)))
    given = (arrived, ranks, part.numel(), kind, part.dtype)
    _replace(writer, wait, writer.call(messages.READ, given))


def _scatter(graph: TrainGraph, scatter: fx.Node, kind: str) -> None:
    source, group = _source(scatter), group_of(scatter)
    (wait,), ranks = scatter.users, ranks_of(scatter)
    assert ranks is not None
    part, writer = scatter.meta["val"], Writer(graph, scatter)
    message = writer.call(messages.WRITE, (source, ranks, kind))
    sizes = [message.meta["val"].numel() // ranks] * ranks
    arrived = writer.wait(writer.call(ALL_TO_ALL, (message, sizes, sizes, group)))
    given = (arrived, ranks, part.numel(), kind, part.dtype)
    _replace(writer, wait, writer.call(messages.AVERAGE, given))


def _replace(writer: Writer, wait: fx.Node, flat: fx.Node) -> None:
    """Lets everything that reads what was waited for read the same from a message."""
    assert wait.target is WAIT
    value, (collective,) = wait.meta["val"], wait.all_input_nodes
    result = writer.call(_VIEW, (flat, list(value.shape)))
    wait.replace_all_uses_with(result)
    renew_views(result, storage_identity(value))
    for replaced in (wait, collective):
        writer.graph.erase_node(replaced)
