"""Where a forward graph may be cut into stages, and the stages that cuts make.

The operators that have work to do stand in a row, and a cut may lie between any two of them.  What
is made before it and read after it goes from rank to rank; a value that skips stages goes straight
to the stages that read it.  What depends on the batch alone (masks, tables of positions) or on
weights alone (casts) is no work of a stage: each stage that reads it makes it, and the batch is
given to every rank.

    h0 = embed(w, ids); m = mask(ids); h1 = block(h0, m); h2 = block(h1, m); loss = head(h2 + h0)

    cut before the second block:
    stage 0    h0 = embed(w, ids); m = mask(ids); h1 = block(h0, m)     sends h0, h1
    stage 1    m = mask(ids); h2 = block(h1, m); loss = head(h2 + h0)

Invariant: one stage after the other computes what the whole graph does, operator by operator.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from fxzero.errors import UsageError
from fxzero.passes.partition import extract
from fxzero.passes.replay_randomness import is_random
from fxzero.pipelining.regions import is_region
from fxzero.storages import arguments_by_name, written_arguments

_ATEN = torch.ops.aten
# These write statistics into buffers, which their schemas do not say.
_WRITE_STATISTICS = (
    _ATEN.batch_norm,
    _ATEN.instance_norm,
    _ATEN.native_batch_norm,
    _ATEN.cudnn_batch_norm,
    _ATEN.miopen_batch_norm,
    _ATEN._batch_norm_impl_index,
)
_STATISTICS = ("running_mean", "running_var")
# These return their argument itself when nothing is dropped, which their schemas do not say.
_DROPOUTS = (
    _ATEN.dropout,
    _ATEN.alpha_dropout,
    _ATEN.feature_dropout,
    _ATEN.feature_alpha_dropout,
)


@dataclass(frozen=True)
class Ports:
    """What a stage takes and returns.

    Attributes:
        leaves: positions in the flat batch of its first arguments.
        received: names of its other arguments, made by earlier stages.
        sent: names of its first results, which later stages receive; the last stage returns the
            model's outputs behind them.
    """

    leaves: tuple[int, ...]
    received: tuple[str, ...]
    sent: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A part of a forward graph."""

    module: fx.GraphModule
    ports: Ports

    @property
    def results(self) -> list[fx.Node]:
        """What it returns."""
        (output,) = self.module.graph.find_nodes(op="output")
        return list(output.args[0])


class Row:
    """The operators of an exported forward graph, in the order in which stages may divide them.

    Attributes:
        work: the operators that stages divide.  A cut is the position of the first one after it.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.work = tuple(_work(module))
        self._owner = {node: index for index, node in enumerate(self.work)}
        for node in module.graph.nodes:
            if node.target is operator.getitem and node.args[0] in self._owner:
                self._owner[node] = self._owner[node.args[0]]
        (output,) = module.graph.find_nodes(op="output")
        self.results: list[fx.Node] = list(output.args[0])
        self._leaves = list(module.graph.find_nodes(op="placeholder"))

    def values_across(self, cut: int) -> list[fx.Node]:
        """What is made before a cut and read after it."""
        return [node for node, last in self._last_reads.items() if self._owner[node] < cut <= last]

    def bytes_across(self, cut: int) -> int:
        """Bytes of ``values_across``."""
        return sum(node.meta["val"].nbytes for node in self.values_across(cut))

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Positions before which the row may be cut.

        Not between the first use of memory and the last write to it: what was sent would be old.
        Nor between uses of a buffer or an input that is written to: each rank has its own.
        """
        forbidden: set[int] = set()
        for first, last in self._written:
            forbidden.update(range(first + 1, last + 1))
        return tuple(cut for cut in range(1, len(self.work)) if cut not in forbidden)

    @cached_property
    def weights_read(self) -> list[list[str]]:
        """For each work, the attributes of the model that it reads, directly or through casts."""
        behind: dict[fx.Node, frozenset[str]] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                behind[node] = frozenset({str(node.target)})
            elif node not in self._owner:
                behind[node] = _union(behind[n] for n in node.all_input_nodes if n in behind)
        return [
            sorted(_union(behind[n] for n in node.all_input_nodes if n in behind))
            for node in self.work
        ]

    def cut(self, cuts: Sequence[int]) -> tuple[Stage, ...]:
        """The stages between cuts, in order.

        Raises:
            UsageError: cuts that are not in order, or not among ``cuts``.
        """
        if list(cuts) != sorted(set(cuts)) or not set(cuts) <= set(self.cuts):
            raise UsageError(
                f"the model cannot be cut before its operators {list(cuts)}\n"
                f"  there are {len(self.cuts)} places to cut, from 1 to {len(self.work) - 1}"
            )
        bounds = [0, *cuts, len(self.work)]
        return tuple(self._stage(bounds, index) for index in range(len(bounds) - 1))

    def _stage(self, bounds: list[int], index: int) -> Stage:
        start, stop = bounds[index], bounds[index + 1]
        own = [node for node, at in self._owner.items() if start <= at < stop]
        sent = [n for n, last in self._last_reads.items() if start <= self._owner[n] < stop <= last]
        last = stop == len(self.work)
        results = [*sent, *(self.results if last else ())]
        needed = self._closure([*own, *results], start)
        ordered = [node for node in self.module.graph.nodes if node in needed]
        leaves = [node for node in self._leaves if node in needed]
        received = [node for node in ordered if self._owner.get(node, start) < start]
        given = {*leaves, *received}
        body = [node for node in ordered if node not in given]
        ports = Ports(
            leaves=tuple(self._leaves.index(node) for node in leaves),
            received=tuple(node.name for node in received),
            sent=tuple(node.name for node in sent),
        )
        return Stage(extract(self.module, [*leaves, *received], body, results), ports)

    def _closure(self, nodes: Iterable[fx.Node], start: int) -> set[fx.Node]:
        """The nodes and all they read, up to what stages before ``start`` made."""
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if self._owner.get(node, start) >= start:
                stack += node.all_input_nodes
        return found

    @cached_property
    def _last_reads(self) -> dict[fx.Node, int]:
        """For each tensor that work makes, the position of the last work that reads it.

        What replicated operators read is read by the work behind them.
        """
        last: dict[fx.Node, int] = {}
        for node in reversed(self.module.graph.nodes):
            if node.op == "output":
                last.update(dict.fromkeys(self.results, len(self.work) - 1))
                continue
            at = self._owner.get(node, last.get(node))
            if at is not None:
                for source in node.all_input_nodes:
                    last[source] = max(last.get(source, at), at)
        return {
            node: last[node]
            for node in self._owner
            if node in last and isinstance(node.meta.get("val"), torch.Tensor)
        }

    @cached_property
    def _written(self) -> list[tuple[int, int]]:
        """For each memory that is written: the positions of its first use and its last write."""
        base = memory_of(self.module.graph)
        first: dict[fx.Node, int] = {}
        last: dict[fx.Node, int] = {}
        for node, at in self._owner.items():
            for touched in (node, *node.all_input_nodes):
                first.setdefault(base[touched], at)
            last.update((base[source], at) for source in _written_by(node))
        for node, at in self._owner.items():
            for touched in node.all_input_nodes:
                # Another rank's stage would read its own, which nobody has written to.
                if base[touched] in last and base[touched].op != "call_function":
                    last[base[touched]] = max(last[base[touched]], at)
        return [(first[node], at) for node, at in last.items()]


def _union(names: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*names)


def _work(module: fx.GraphModule) -> list[fx.Node]:
    """All operators but those that depend on the batch alone or on weights alone."""
    graph = module.graph
    weights = dict(module.named_parameters(remove_duplicate=False))
    touching = _touching_written(graph)
    mixed: dict[fx.Node, frozenset[str]] = {}
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            mixed[node] = frozenset({"batch"})
        elif node.op == "get_attr":
            mixed[node] = frozenset({"weight"} if node.target in weights else {})
        elif node.op == "call_function":
            mixed[node] = _union(mixed[n] for n in node.all_input_nodes)
            if node.target is operator.getitem:
                continue
            effect = node in touching or is_random(node) or is_region(node) or not node.users
            if len(mixed[node]) > 1 or effect:
                mixed[node] = frozenset({"batch", "weight"})
                found.append(node)
    return found


def _touching_written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that make, view, read or write memory that is written to."""
    base = memory_of(graph)
    written = {base[source] for node in base for source in _written_by(node)}
    return {n for n in base if any(base[m] in written for m in (n, *n.all_input_nodes))}


def memory_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node, the one that made the memory of its value."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            base[node] = next((base[source] for source in _aliased(node)), node)
    return base


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node writes to, those included that no schema tells of."""
    written = written_arguments(node)
    if is_region(node):  # what it does inside is not looked at
        written += [source for source in node.all_input_nodes if source.op == "get_attr"]
    if getattr(node.target, "_overloadpacket", None) in _WRITE_STATISTICS:
        given = arguments_by_name(node)
        written += [given[name] for name in _STATISTICS if isinstance(given[name], fx.Node)]
    return written


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory is the value's or is written."""
    if node.target is operator.getitem:
        return [node.all_input_nodes[0]]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target._overloadpacket in _DROPOUTS:
        return [node.all_input_nodes[0]]
    given = arguments_by_name(node)
    return [
        given[argument.name]
        for argument in node.target._schema.arguments
        if argument.alias_info is not None and isinstance(given[argument.name], fx.Node)
    ]
