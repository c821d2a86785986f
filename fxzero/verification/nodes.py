"""The first node at which a graph goes wrong: beside the same graph before a pass, or by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero import _torch, randomness
from fxzero.capture import user_line
from fxzero.graph import TrainGraph, describe
from fxzero.passes.listing import format_call, module_of
from fxzero.passes.offload import FETCH_OF
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.storages import tensor_leaves
from fxzero.verification.playing import Outcome, Situation, name_of, play
from fxzero.verification.values import (
    fingerprint,
    first_difference,
    first_index,
    largest_difference,
)


@dataclass(frozen=True)
class NodeDifference:
    """Where a graph behind a pass first computes something else than before it.

    Attributes:
        node: its name.
        result: what it is of the step, such as "gradient of head.weight"; "" for a value on the
            way.
        before, after: the operator and its arguments in the graph before the pass, and behind it.
            "" where there is none.
        value: dtype and shape.
        module: the innermost module that made it.
        source: the user's line that made it.
        largest: the largest absolute difference.
        index: the first at which values differ.
        expected, found: the values there.
    """

    node: str
    result: str
    before: str
    after: str
    value: str
    module: str
    source: str
    largest: float
    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True)
class NonFinite:
    """A value that is not finite, made from values that were.

    Attributes:
        kind: "NaN" or "inf".
        node: its name.
        made_by: the operator and its arguments; "" for what the graph is given.
        value: dtype and shape.
        module, source: as in ``NodeDifference``.
        index: the first that is not finite.
        given: for an operator, the smallest and the largest of each floating value that it read; of
            what the graph is given, its name.
    """

    kind: str
    node: str
    made_by: str
    value: str
    module: str
    source: str
    index: tuple[int, ...]
    given: str


def first_difference_behind(
    index: int, situation: Situation, expected: Outcome, found: Outcome
) -> NodeDifference | None:
    """The first node that differs behind the pass at ``index`` from what it was before the pass.

    Nodes are those of the same name; clones and fetches are held against their originals.  Where
    all of these are equal, it is the node that the step's first differing result comes from.  On
    many ranks all of them must call it; None where nothing differs on this one.

    Args:
        expected, found: the step's outcomes before the pass and behind it.
    """
    prints: dict[str, tuple[str, bytes]] = {}
    play(index, situation, lambda node, value: prints.update({node.name: _summary(value)}))
    after = _FirstDifferent(prints)
    play(index + 1, situation, after)
    name = "" if after.node is None else _original(after.node)
    before = _Value(name)
    play(index, situation, before)
    if after.node is None or before.node is None:
        return _result(index, situation, expected, found)
    return _difference(after.node, before.node, "", after.value, before.value)


def _summary(value: Any) -> tuple[str, bytes]:
    return describe(value), fingerprint(value)


def _original(node: fx.Node) -> str:
    """The name of the node whose value this one must have."""
    return str(node.meta.get(CLONE_OF) or node.meta.get(FETCH_OF) or node.name)


class _FirstDifferent:
    """Keeps the first node whose value is not the one that it was in another graph."""

    def __init__(self, prints: Mapping[str, tuple[str, bytes]]) -> None:
        self.prints = prints
        self.node: fx.Node | None = None
        self.value: Any = None

    def __call__(self, node: fx.Node, value: Any) -> None:
        if self.node is not None or node.target is randomness.draw:
            return
        known = self.prints.get(_original(node))
        if known is not None and known[0] == describe(value) and known != _summary(value):
            self.node, self.value = node, tensor_leaves(value)
            self.value = [tensor.clone() for tensor in self.value]


class _Value:
    """Keeps the value of one node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.node: fx.Node | None = None
        self.value: list[torch.Tensor] = []

    def __call__(self, node: fx.Node, value: Any) -> None:
        if node.name == self.name:
            self.node = node
            self.value = [tensor.clone() for tensor in tensor_leaves(value)]


def _difference(
    after: fx.Node,
    before: fx.Node | None,
    result: str,
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
) -> NodeDifference:
    pairs = list(zip(found, expected, strict=True))
    one, other = max(pairs, key=lambda pair: largest_difference(*pair))
    alike = one.shape == other.shape and largest_difference(one, other) > 0
    index = first_difference(one, other) if alike else ()
    origin = after if user_line(after) or before is None else before
    return NodeDifference(
        node=after.name,
        result=result,
        before="" if before is None else format_call(before),
        after=format_call(after),
        value=describe(one),
        module=module_of(origin),
        source=user_line(origin) or "",
        largest=largest_difference(one, other),
        index=index,
        expected=_number(other[index]) if alike else float("nan"),
        found=_number(one[index]) if alike else float("nan"),
    )


def _number(value: torch.Tensor) -> float:
    return float(value.abs() if value.is_complex() else value) + 0.0  # no negative zero


def _result(
    index: int, situation: Situation, expected: Outcome, found: Outcome
) -> NodeDifference | None:
    """The node behind the first result that differs."""
    differing = [item for item in found.differing(expected) if item[0] != "random stream"]
    if not differing:
        return None
    kind, name = differing[0]
    after, before = (
        _results(situation.step.partway(count)).get((kind, name)) for count in (index + 1, index)
    )
    one, other = found.value(kind, name), expected.value(kind, name)
    node = after or before
    if node is None:
        return None
    what = f"{kind} of {name}" if kind == "gradient" else f"{kind} {name}"
    if one is None or other is None:  # the step does not make it any more, or made none
        present = [tensor for tensor in (one, other) if tensor is not None]
        return NodeDifference(
            node=node.name,
            result=what,
            before=format_call(before) if before is not None else "",
            after=format_call(after) if after is not None else "",
            value=describe(present[0]),
            module=module_of(node),
            source=user_line(node) or "",
            largest=float("inf"),
            index=(),
            expected=float("nan"),
            found=float("nan"),
        )
    return _difference(node, before, what, [one], [other])


def _results(graph: TrainGraph) -> dict[tuple[str, str], fx.Node]:
    """The nodes that a graph returns, by what ``Outcome.differing`` calls them."""
    found = {}
    for role, node in graph.result_pairs():
        if not isinstance(node, fx.Node):
            continue
        if role.kind == "output":
            found["output", str(role.index)] = node
        elif role.of is not None:
            kind = "buffer" if role.kind == "mutation" else "gradient"
            found[kind, name_of(role.of)] = node
    return found


def first_non_finite(situation: Situation) -> tuple[NonFinite, ...]:
    """Where what is not finite in the traced step comes from, the NaN before the infinity.

    Followed back from its results, so that an infinity that is meant to be there, such as that of
    an attention mask, is not found.  On many ranks all of them must call it.
    """
    seen = _Finiteness()
    play(0, situation, seen)
    graph = situation.step.partway(0)
    nodes = {node.name: node for node in graph.graph.nodes}
    names: dict[str, str] = {}
    for role, node in graph.pairs():
        if role.kind in ("parameter", "buffer", "input"):
            names[node.name] = f"{role.kind} {role.name or role.index}"
            tensor = situation.step.tensor_for(role, situation.leaves).detach()
            seen.note(node.name, tensor, names[node.name])
    found: list[NonFinite] = []
    wrong = (node for node in graph.results if isinstance(node, fx.Node))
    current = next((node for node in wrong if node.name in seen.marks), None)
    while current is not None:
        marks = seen.marks
        sources = [s for s in current.all_input_nodes if s.name in marks]
        sources.sort(key=lambda node: marks[node.name].is_nan, reverse=True)
        mark = marks[current.name]
        if not sources or (mark.is_nan and not marks[sources[0].name].is_nan):
            given = names.get(current.name) or seen.ranges_of(current)
            found.append(_non_finite(nodes[current.name], mark, given))
        current = sources[0] if sources else None
    return tuple(found)


@dataclass(frozen=True)
class _Mark:
    is_nan: bool
    index: tuple[int, ...]


@dataclass
class _Finiteness:
    """Notes which values are not finite, and the range of the others."""

    marks: dict[str, _Mark] = field(default_factory=dict)
    ranges: dict[str, str] = field(default_factory=dict)

    def __call__(self, node: fx.Node, value: Any) -> None:
        for tensor in tensor_leaves(value):
            if node.name not in self.marks:
                self.note(node.name, tensor)

    def note(self, name: str, tensor: torch.Tensor, called: str = "") -> None:
        tensor = _torch.local_tensor(tensor)
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return
        self.ranges[name] = (
            f"{called or name} in [{float(tensor.min()):.4g}, {float(tensor.max()):.4g}]"
        )
        finite = tensor.isfinite()
        if not bool(finite.all()):
            is_nan = bool(tensor.isnan().any())
            self.marks[name] = _Mark(is_nan, first_index(tensor.isnan() if is_nan else ~finite))

    def ranges_of(self, node: fx.Node) -> str:
        """What the node read."""
        return ", ".join(
            self.ranges[source.name]
            for source in node.all_input_nodes
            if source.name in self.ranges
        )


def _non_finite(node: fx.Node, mark: _Mark, given: str) -> NonFinite:
    return NonFinite(
        kind="NaN" if mark.is_nan else "inf",
        node=node.name,
        made_by=format_call(node) if node.op == "call_function" else "",
        value=describe(node.meta.get("val")),
        module=module_of(node),
        source=user_line(node) or "",
        index=mark.index,
        given=given,
    )
