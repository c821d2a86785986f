"""Parameters become shards: gathered before they are used, their gradients reduced behind them.

A placeholder takes a rank's part of the parameter, rows padded to those of the first rank.  Before
the first use an all-gather makes it whole; behind each gradient a reduce-scatter averages it over
the ranks and leaves the rank's part.  Where a parameter is whole on every rank, its gradient is
averaged by an all-reduce.

A graph that runs once for each of several micro-batches may be given whole parameters besides their
parts, gathered once for all of them: it has no gathers then.

A gather is an operator like any other: that the backward does it again (ZeRO-3) or reads what the
forward gathered (ZeRO-2) is a decision of the plan.  In stage 1 gradients stay whole until the
backward ends.

Invariant: afterwards no node but a cast and the gather reads a sharded placeholder (or none, where
what is gathered is given), every gather and reduction has one wait, and each gradient has the shape
and dtype of its placeholder.

    w [8, 4]:  t(w); ...; dw = mm(...)        w [2, 4]:  g = all_gather(w, 4, "dp"); u = wait(g)
    output:    [loss, dw]               ->               t(u); ...; dw = mm(...)
                                              s = reduce_scatter(dw, "avg", 4, "dp"); v = wait(s)
                                              output:    [loss, v]
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fxzero import _torch
from fxzero.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from fxzero.graph import InputRole, TrainGraph
from fxzero.mesh import Sharding
from fxzero.passes.context import PassContext
from fxzero.passes.writer import Writer, renew_views
from fxzero.sharding import may_shard, padded_rows
from fxzero.storages import storage_identity

# In the meta of a sharded placeholder: the parameter as it is when gathered.
WHOLE = "whole"

_ATEN = torch.ops.aten


def shard_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Spreads parameters and gradients as ``context.sharding`` says."""
    sharding = context.sharding
    if sharding.shards == 1 and not sharding.replicate:
        return graph
    rewrite = _Rewrite(graph, sharding)
    placeholders = dict(graph.pairs())
    results = list(graph.results)
    whole = {role: node.meta["val"] for role, node in placeholders.items()}
    inputs = list(graph.inputs)
    for role, node in placeholders.items():
        is_cut = role.kind == "parameter" and sharding.shards > 1 and may_shard(whole[role])
        if is_cut and rewrite.cut(node, context.gathers):
            inputs.append(InputRole("gathered", role.name))
    if context.reduces:
        for index, (result, value) in enumerate(graph.result_pairs()):
            of = result.of
            if result.kind != "gradient" or of is None or of.kind != "parameter":
                continue
            if isinstance(value, fx.Node):
                results[index] = rewrite.reduce(value, placeholders[of], whole[of])
    (output,) = graph.graph.find_nodes(op="output")
    output.args = (tuple(results),)
    graph.graph.lint()
    return replace(graph, inputs=tuple(inputs))


def left_whole(graph: TrainGraph, sharding: Sharding) -> list[str]:
    """A note on every parameter that should be cut and could not be; scalars are not worth it."""
    if sharding.shard is None:
        return []
    return [
        f"parameter {role.name} stays whole on every rank: its memory is not contiguous"
        for role, node in graph.pairs()
        if role.kind == "parameter" and WHOLE not in node.meta
        if not node.meta["val"].is_contiguous()
    ]


class _Rewrite:
    def __init__(self, graph: TrainGraph, sharding: Sharding) -> None:
        self.graph = graph
        self.sharding = sharding
        self.order = {node: index for index, node in enumerate(graph.graph.nodes)}
        (self.output,) = graph.graph.find_nodes(op="output")

    def cut(self, parameter: fx.Node, gathers: bool) -> bool:
        """Lets everything that reads a parameter read what is gathered from its parts.

        Args:
            gathers: whether that is done here.

        Returns:
            Whether there is a placeholder for it, behind all others.
        """
        whole, axis = parameter.meta["val"], self.sharding.shard
        assert axis is not None
        rows = padded_rows(whole.shape[0], axis.size)
        mode = _torch.fake_mode_of([whole])
        assert mode is not None
        with mode:
            part = whole.new_empty((rows, *whole.shape[1:]))
            parameter.meta = {**parameter.meta, "val": part, WHOLE: whole}
        users = sorted(parameter.users, key=self.order.__getitem__)
        users = [user for user in users if user is not self.output]
        if not users:
            return False
        source, users_value = parameter, whole
        if (cast := _narrowing_cast(users)) is not None:
            # What travels is as narrow as what is computed.
            source, users = cast, sorted(cast.users, key=self.order.__getitem__)
            users_value = cast.meta["val"]
            users[0].prepend(cast)
            with mode:
                cast.meta = {**cast.meta, "val": part.to(cast.meta["val"].dtype)}
        if gathers:
            writer = Writer(self.graph, users[0])
            arguments = (source, axis.size, axis.name)
            gathered = writer.call(ALL_GATHER, arguments, f"{parameter.name}_gathered")
            result = writer.wait(gathered)
            if rows * axis.size > whole.shape[0]:
                result = writer.call(_ATEN.slice.Tensor, (result, 0, 0, whole.shape[0]))
        else:
            with self.graph.graph.inserting_after(self.graph.placeholders[-1]):
                result = self.graph.graph.placeholder(f"{parameter.name}_gathered")
            with mode:
                result.meta = {"val": torch.empty_like(users_value)}
        stale = storage_identity(users_value)
        for user in users:
            user.replace_input_with(source, result)
        renew_views(result, stale)
        if source is not parameter and not source.users:
            self.graph.graph.erase_node(source)
        return not gathers

    def reduce(self, gradient: fx.Node, parameter: fx.Node, whole: torch.Tensor) -> fx.Node:
        """The gradient's average over the ranks, cut as the parameter is."""
        sharding, part = self.sharding, parameter.meta["val"]
        late = sharding.zero == 1 or self.order.get(gradient, -1) < 0
        writer = Writer(self.graph, self.output if late else gradient.next, gradient)
        value = gradient
        is_cut = part is not whole
        if sharding.reduce_dtype is not None:
            value = writer.cast(value, getattr(torch, sharding.reduce_dtype))
        if is_cut:
            assert sharding.shard is not None
            axis = sharding.shard
            missing = part.shape[0] * axis.size - whole.shape[0]
            if missing:
                pads = [0, 0] * (whole.ndim - 1) + [0, missing]
                value = writer.call(_ATEN.constant_pad_nd.default, (value, pads))
            value = writer.contiguous(value)
            value = writer.call(REDUCE_SCATTER, (value, "avg", axis.size, axis.name))
            value = writer.wait(value)
        for axis in sharding.replicate if is_cut else sharding.axes:
            value = writer.contiguous(value)
            value = writer.wait(writer.call(ALL_REDUCE, (value, "avg", axis.name)))
        return writer.cast(value, part.dtype)


def _narrowing_cast(users: list[fx.Node]) -> fx.Node | None:
    """The only reader of a parameter, if it is a cast to a smaller dtype."""
    if len(users) != 1 or users[0].target is not _ATEN._to_copy.default:
        return None
    (source,) = users[0].all_input_nodes
    if set(users[0].kwargs) != {"dtype"}:
        return None
    narrower = users[0].meta["val"].itemsize < source.meta["val"].itemsize
    return users[0] if narrower else None
