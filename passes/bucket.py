"""Collectives that follow one another become one: a collective costs a latency, however small.

Gathers of parameters that are used one after the other start together where the first one did;
gradients that become ready one after the other are reduced together where the last one was.  The
parts stay tensors of their own, so nothing is copied into a bucket or out of it, and each part is
kept, gathered again or freed by itself.  Forward and backward never share a bucket.

gloo scatters the sums of a list of gradients one by one, and cannot run several gathers of lists
at once (see ``collectives``).  There the parts of both are copied side by side into one tensor,
which is taken apart where it is waited for; all-reduces are lists there too.  Messages of codes
are copied side by side everywhere: they are small.

Invariant: a bucket moves no more than ``context.decisions.bucket_bytes``, over one dimension of the
mesh, and no part is read before it is waited for.

    g1 = all_gather(w1); u1 = wait(g1); y = f(u1, x)     g = all_gather([w1, w2]); g1, g2 = g
    g2 = all_gather(w2); u2 = wait(g2); z = h(u2, y)  -> u1 = wait(g1); y = f(u1, x)
                                                         u2 = wait(g2); z = h(u2, y)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fxzero.collectives import (
    ALL_GATHER,
    ALL_TO_ALL,
    COALESCED,
    REDUCE_SCATTER,
    group_of,
    is_gather,
    preparation,
    ranks_of,
)
from fxzero.graph import TrainGraph
from fxzero.messages import WRITE
from fxzero.passes.context import PassContext
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.passes.writer import Writer, renew_views
from fxzero.storages import storage_identity

# In the meta of a parameter that is copied out of a bucket: the wait in whose place it stands.
GATHERED = "gathered"

_ATEN = torch.ops.aten
_PREPARE = (_ATEN._to_copy.default, WRITE)


def bucket_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Merges collectives up to ``context.decisions.bucket_bytes``."""
    limit = context.decisions.bucket_bytes
    if limit:
        flat = context.device == "cpu"
        for backward in (False, True):
            _merge_gathers(graph, limit, backward, flat)
        # Where gradients are averaged over two dimensions, the second average follows the first.
        for target in dict.fromkeys(n.target for n in graph.graph.nodes if _reduces(n)):
            _merge_reductions(graph, limit, target, flat)
        graph.graph.lint()
    return graph


def _reduces(node: fx.Node) -> bool:
    return node.target is ALL_TO_ALL or (node.target in COALESCED and not is_gather(node))


def _merge_gathers(graph: TrainGraph, limit: int, backward: bool, flat: bool) -> None:
    gathers = [
        node
        for node in graph.graph.nodes
        if node.target in COALESCED and is_gather(node) and graph.is_backward(node) == backward
    ]
    for members in _buckets((n for n in gathers if _is_early(n)), limit):
        for member in members[1:]:
            for source in reversed(preparation(member)):
                if source.op != "placeholder" and members[0] < source:
                    members[0].prepend(source)
        if flat:
            _gather_flat(graph, members)
        else:
            _merge(graph.graph, members, before=members[0])


def _is_early(gather: fx.Node) -> bool:
    """Whether a gather may start earlier: a part of a parameter is always there."""
    *steps, source = preparation(gather)
    return source.op == "placeholder" and all(step.target in _PREPARE for step in steps)


def _merge_reductions(graph: TrainGraph, limit: int, target: Any, flat: bool) -> None:
    nodes = [node for node in graph.graph.nodes if node.target is target]
    for members in _buckets(nodes, limit):
        last = members[-1]
        behind = [node for member in members for node in _behind(member)]
        for node in reversed(behind):
            last.append(node)
        if target is ALL_TO_ALL:
            _exchange_flat(Writer(graph, last), members)
        elif flat and target is REDUCE_SCATTER:
            _reduce_flat(Writer(graph, last), members)
        else:
            _merge(graph.graph, members, before=last)


def _behind(reduction: fx.Node) -> Iterator[fx.Node]:
    """What is computed from a reduced gradient before it is returned, in order."""
    pending = list(reduction.users)
    while pending:
        node = pending.pop(0)
        if node.op != "output":
            yield node
            pending += node.users


def _buckets(nodes: Iterable[fx.Node], limit: int) -> list[list[fx.Node]]:
    """Runs of nodes that may be one collective, two or more in each."""
    found: list[list[fx.Node]] = []
    room, kind = 0, None
    for node in nodes:
        size = _bytes(node)
        if not found or size > room or _kind(node) != kind:
            found.append([])
            room, kind = limit, _kind(node)
        found[-1].append(node)
        room -= size
    return [members for members in found if len(members) > 1]


def _bytes(node: fx.Node) -> int:
    """Bytes of the whole parameter or gradient."""
    values = [node.meta["val"], *(source.meta["val"] for source in node.all_input_nodes)]
    return max(int(value.nbytes) for value in values)


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """Equal for collectives that can be one: but for their tensors they are called alike."""
    how = ranks_of(node) if node.target is ALL_TO_ALL else node.args[1:]
    return node.target, group_of(node), node.meta["val"].dtype, how


def _merge(graph: fx.Graph, members: list[fx.Node], before: fx.Node) -> None:
    first = members[0]
    args = ([node.args[0] for node in members], *first.args[1:])
    with graph.inserting_before(before):
        bucket = graph.call_function(COALESCED[first.target], args)
        parts = [graph.call_function(operator.getitem, (bucket, i)) for i in range(len(members))]
    bucket.meta = _plain(first.meta) | {"val": [node.meta["val"] for node in members]}
    for node, part in zip(members, parts, strict=True):
        part.meta = _plain(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _gather_flat(graph: TrainGraph, members: list[fx.Node]) -> None:
    """One collective of one tensor, which is taken apart where the first part is waited for."""
    _, ranks, group = members[0].args
    sources = [node.all_input_nodes[0] for node in members]
    waits = [wait for node in members for wait in node.users]
    sizes = [source.meta["val"].numel() for source in sources]
    start, end = Writer(graph, members[0]), Writer(graph, waits[0])
    rows = [start.call(_ATEN.view.default, (source, [-1])) for source in sources]
    bucket = start.call(ALL_GATHER, (start.call(_ATEN.cat.default, (rows,)), ranks, group))
    whole = end.call(_ATEN.view.default, (end.wait(bucket), [ranks, -1]))
    parts = end.call(_ATEN.split_with_sizes.default, (whole, sizes, 1))
    for index, (gather, wait) in enumerate(zip(members, waits, strict=True)):
        copy = end.contiguous(end.call(operator.getitem, (parts, index)))
        copy.meta[GATHERED] = wait.meta.get(CLONE_OF, wait.name)
        part = end.call(_ATEN.view.default, (copy, list(gather.meta["val"].shape)))
        part.meta = {**_plain(wait.meta), "val": part.meta["val"]}
        wait.replace_all_uses_with(part)
        renew_views(part, storage_identity(wait.meta["val"]))
    for replaced in (*waits, *members):
        graph.graph.erase_node(replaced)


def _reduce_flat(writer: Writer, members: list[fx.Node]) -> None:
    """One collective of one tensor: each rank's parts of all gradients side by side."""
    _, operation, ranks, group = members[0].args
    sources = [node.all_input_nodes[0] for node in members]
    rows = [writer.call(_ATEN.view.default, (source, [ranks, -1])) for source in sources]
    bucket = writer.call(_ATEN.view.default, (writer.call(_ATEN.cat.default, (rows, 1)), [-1]))
    reduced = writer.call(REDUCE_SCATTER, (bucket, operation, ranks, group))
    values = [node.meta["val"] for node in members]
    sizes = [value.numel() for value in values]
    parts = writer.call(_ATEN.split_with_sizes.default, (writer.wait(reduced), sizes))
    waits = [wait for node in members for wait in node.users]
    for index, (wait, value) in enumerate(zip(waits, values, strict=True)):
        piece = writer.call(operator.getitem, (parts, index))
        part = writer.call(_ATEN.view.default, (piece, list(value.shape)))
        wait.replace_all_uses_with(part)
        renew_views(part, storage_identity(wait.meta["val"]))
    for replaced in (*waits, *members):
        writer.graph.erase_node(replaced)


def _exchange_flat(writer: Writer, members: list[fx.Node]) -> None:
    """One collective of one tensor: for each rank its pieces of all messages side by side."""
    ranks, group = ranks_of(members[0]), group_of(members[0])
    assert ranks is not None
    sources = [node.all_input_nodes[0] for node in members]
    sizes = [source.meta["val"].numel() // ranks for source in sources]
    rows = [writer.call(_ATEN.view.default, (source, [ranks, -1])) for source in sources]
    bucket = writer.call(_ATEN.view.default, (writer.call(_ATEN.cat.default, (rows, 1)), [-1]))
    total = [sum(sizes)] * ranks
    arrived = writer.wait(writer.call(ALL_TO_ALL, (bucket, total, total, group)))
    whole = writer.call(_ATEN.view.default, (arrived, [ranks, -1]))
    parts = writer.call(_ATEN.split_with_sizes.default, (whole, sizes, 1))
    waits = [wait for node in members for wait in node.users]
    for index, wait in enumerate(waits):
        piece = writer.contiguous(writer.call(operator.getitem, (parts, index)))
        wait.replace_all_uses_with(writer.call(_ATEN.view.default, (piece, [-1])))
    for replaced in (*waits, *members):
        writer.graph.erase_node(replaced)


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """A bucket recomputes no one operator."""
    return {key: value for key, value in meta.items() if key != CLONE_OF}
