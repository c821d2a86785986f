"""The law of training graphs, checked around every pass in tests and under ``FXZERO_SPEC=1``.

Each check is a function whose docstring states one law; ``CHECKS`` lists them.  A graph is in a
stage:

    traced      fresh from capture, or between two passes
    scheduled   after the last pass: what is cut in two and run

A broken law is a bug of ours, never the user's: it raises GraphLawError with every violation and
the graph's text around the first.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxzero import _torch, randomness
from fxzero.collectives import is_gather, is_wait
from fxzero.errors import GraphLawError, first_line
from fxzero.graph import TrainGraph, describe
from fxzero.passes.derivations import is_known, remember
from fxzero.passes.listing import format_nodes
from fxzero.passes.offload import FETCH_OF
from fxzero.passes.partition import Split
from fxzero.passes.rematerialize import CLONE_OF
from fxzero.passes.replay_randomness import is_random
from fxzero.passes.shard import WHOLE
from fxzero.storages import Storages, analyse, tensor_leaves, written_arguments
from fxzero.transfers import TO_DEVICE, TO_HOST
from fxzero.updating import UPDATE

log = logging.getLogger(__name__)

STAGES = ("traced", "scheduled")
_CONTEXT_LINES = 10

Finding = tuple[fx.Node | None, str]


@dataclass(frozen=True)
class Check:
    """One law: its name in messages, its words, and the function that finds what breaks it."""

    name: str
    law: str
    find: Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True)
class Violation:
    """One breach of a law."""

    check: str
    node: fx.Node | None
    message: str

    def __str__(self) -> str:
        where = f" {self.node.name}:" if self.node is not None else ""
        return f"[{self.check}]{where} {self.message}"


@dataclass(frozen=True)
class Subject:
    """A graph under examination, with what several checks ask of it."""

    graph: TrainGraph
    scheduled: bool

    @cached_property
    def calls(self) -> list[fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "call_function"]

    @cached_property
    def clones(self) -> list[fx.Node]:
        return [node for node in self.calls if CLONE_OF in node.meta]

    @cached_property
    def by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.graph.nodes}

    @cached_property
    def storages(self) -> Storages:
        return analyse(self.graph.graph.nodes)

    @cached_property
    def mode(self) -> _torch.FakeTensorMode:
        nodes = self.graph.graph.nodes
        mode = _torch.fake_mode_of([t for n in nodes for t in tensor_leaves(n.meta.get("val"))])
        assert mode is not None, "no node has a fake value"
        return mode

    @cached_property
    def tangents(self) -> set[fx.Node]:
        return {node for role, node in self.graph.pairs() if role.kind == "tangent"}

    def in_backward(self, node: fx.Node) -> bool:
        return node in self.tangents or (
            node.op == "call_function" and self.graph.is_backward(node)
        )


def check_graph(graph: TrainGraph, *, stage: str, when: str = "") -> None:
    """Checks every law.

    Args:
        stage: "traced" or "scheduled".
        when: where in the pipeline the graph stands, for the message.

    Raises:
        GraphLawError: naming each violation.
    """
    assert stage in STAGES, stage
    violations = find_violations(graph, stage=stage)
    if violations:
        count = f"{len(violations)} violation{'s' if len(violations) > 1 else ''}"
        lines = [f"{when or stage}: {count} of the graph's law ({stage})"]
        lines += [f"  {violation}" for violation in violations]
        node = next((v.node for v in violations if v.node is not None), None)
        raise GraphLawError("\n".join([*lines, *_surroundings(graph, node)]))
    log.debug(
        "%s: %.0f %% of the forward has a source line", when or stage, 100 * known_origins(graph)
    )


def find_violations(graph: TrainGraph, *, stage: str) -> list[Violation]:
    """Every violation, in the order of ``CHECKS``."""
    subject = Subject(graph, stage == "scheduled")
    found: list[Violation] = []
    for check in CHECKS:
        try:
            found += [Violation(check.name, *finding) for finding in check.find(subject)]
        except Exception as error:
            if not found:  # over a graph known to be broken, later checks may well fall
                message = f"cannot be checked: {type(error).__name__}: {error}"
                found.append(Violation(check.name, None, message))
    return found


def lint(subject: Subject) -> Iterator[Finding]:
    """fx's own law: every node is defined before it is read, and belongs to this graph."""
    try:
        subject.graph.graph.lint()
    except Exception as error:
        yield None, first_line(error)


def signature(subject: Subject) -> Iterator[Finding]:
    """Every input and output has its role, no two the same; a tangent is like its output."""
    graph = subject.graph
    for roles, nodes, what in (
        (graph.inputs, graph.placeholders, "inputs"),
        (graph.outputs, graph.results, "outputs"),
    ):
        if len(roles) != len(nodes):
            yield None, f"{len(nodes)} {what}, {len(roles)} roles"
            return
    if len(set(graph.inputs)) != len(graph.inputs):
        yield None, "two inputs have one role"
    outputs = {role.index: node for role, node in graph.result_pairs() if role.kind == "output"}
    for role, node in graph.pairs():
        if role.kind == "tangent" and role.index not in outputs:
            yield node, f"tangent of output {role.index}, which does not exist"
        elif role.kind == "tangent":
            yield from _compare(node, "tangent", outputs[role.index], "its output")
    for result_role, result in graph.result_pairs():
        kinds = ("output", "mutation") if result is None else ("absent",)
        if result_role.kind in kinds:
            yield result, f"output of kind {result_role.kind!r} is {result}"


def values(subject: Subject) -> Iterator[Finding]:
    """Every call has a value, and its operator derives the same one from its arguments."""
    for node in subject.calls:
        if "val" not in node.meta:
            if not _returns_nothing(node):
                yield node, "has no value"
            continue
        if is_known(node):
            continue
        try:
            derived = _derive(node, subject.mode)
        except _torch.NO_FAKE_ERRORS:
            continue
        except Exception as error:
            yield node, f"cannot run on its arguments: {type(error).__name__}: {error}"
            continue
        if _layout(derived) != _layout(node.meta["val"]):
            recorded = _layout(node.meta["val"])
            yield node, f"value is recorded as {recorded}, derived as {_layout(derived)}"
        else:
            remember(node)


def phases(subject: Subject) -> Iterator[Finding]:
    """The forward reads nothing of the backward; once scheduled, it stands before all of it."""
    first: fx.Node | None = None
    for node in subject.calls:
        if subject.in_backward(node):
            first = first or node
            continue
        for source in node.all_input_nodes:
            if subject.in_backward(source):
                yield node, f"forward node reads {source.name} of the backward"
        if subject.scheduled and first is not None:
            yield node, f"forward node after {first.name} of the backward"
    for role, result in subject.graph.result_pairs():
        if role.kind in ("output", "mutation") and subject.in_backward(result):
            yield result, f"backward node is an output of kind {role.kind!r}"


def draws(subject: Subject) -> Iterator[Finding]:
    """Once scheduled, a random operator runs again only from the state its original saved."""
    if not subject.scheduled:
        return
    for node in subject.calls:
        if node.target is randomness.draw_again:
            yield from _replays_original(subject, node)
        elif CLONE_OF in node.meta and is_random(node):
            yield node, f"draws again what {node.meta[CLONE_OF]} drew, from no saved state"


def collectives(subject: Subject) -> Iterator[Finding]:
    """Each result of a functional collective is read by one wait, and by nothing else."""
    for node in subject.calls:
        if _namespace(node) != "_c10d_functional" or is_wait(node):
            continue
        many = isinstance(node.meta.get("val"), (tuple, list))
        for result in node.users if many else [node]:
            waits = [user for user in result.users if is_wait(user)]
            others = [user.name for user in result.users if not is_wait(user)]
            if len(waits) != 1:
                yield result, f"collective with {len(waits)} waits"
            if others:
                yield result, f"collective read by {', '.join(others)} without a wait"


def recomputed(subject: Subject) -> Iterator[Finding]:
    """A recomputed node runs in the backward and calls what its original calls, on like values."""
    for node in subject.clones:
        original = subject.by_name.get(node.meta[CLONE_OF])
        if original is None and (is_gather(node) or is_wait(node)):
            continue  # the forward's has become part of a bucket
        if original is None:
            yield node, f"recomputes {node.meta[CLONE_OF]}, which does not exist"
            continue
        if not subject.in_backward(node) or subject.in_backward(original):
            yield node, "recomputes a backward node, or does it in the forward"
        if _call(node) != _call(original):
            yield node, f"calls {_call(node)}, its original {_call(original)}"
        yield from _compare(node, "clone", original, "its original")
        target = _call(node)[0]
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            yield node, f"recomputes {target}, which writes to its arguments"


def transfers(subject: Subject) -> Iterator[Finding]:
    """A fetch runs in the backward, reads the host copy of the value it names, and is like it."""
    for node in subject.calls:
        if node.target is TO_HOST and subject.in_backward(node):
            yield node, "copies a value of the backward to the host"
        if node.target is not TO_DEVICE:
            continue
        original = subject.by_name.get(node.meta.get(FETCH_OF, ""))
        source: Any = node.args[0]
        if original is None or source.target is not TO_HOST or source.args[0] is not original:
            yield node, f"fetches {source.name}, no host copy of {node.meta.get(FETCH_OF)}"
            continue
        if not subject.in_backward(node):
            yield node, "fetches in the forward"
        if _layout(node.meta["val"]) != _layout(original.meta["val"]):
            yield node, f"is {_layout(node.meta['val'])}, {original.name} another"


def writes(subject: Subject) -> Iterator[Finding]:
    """Once scheduled, an input is written once at most, and nothing reads it afterwards."""
    if not subject.scheduled:
        return
    of = subject.storages.of
    inputs = {s: node for node in subject.graph.placeholders for s in of[node]}
    written: dict[int, fx.Node] = {}
    for node in subject.calls:
        for storage in {s for source in node.all_input_nodes for s in of[source]} & set(written):
            yield node, f"uses {inputs[storage].name} after {written[storage].name} wrote to it"
        for target in written_arguments(node):
            written.update((s, node) for s in of[target] if s in inputs)
    for role, result in subject.graph.result_pairs():
        for storage in set(of.get(result, ())) & set(written):
            if role.kind == "output":
                yield result, f"returns {inputs[storage].name}, which is written to"


def gradients(subject: Subject) -> Iterator[Finding]:
    """Each gradient is like its input in shape, dtype and device, or like it when gathered."""
    placeholders = dict(subject.graph.pairs())
    for role, node in subject.graph.result_pairs():
        if role.kind != "gradient" or node is None or node.target is UPDATE:
            continue  # None: of an input that the outputs ignore
        if role.of not in placeholders:
            yield node, f"gradient of an unknown input {role.of}"
        elif _kind(node.meta["val"]) != _kind(placeholders[role.of].meta.get(WHOLE)):
            yield from _compare(node, "gradient", placeholders[role.of], "its input")


def origins(subject: Subject) -> Iterator[Finding]:
    """A recomputed node keeps the module and the source line of its original."""
    for node in subject.clones:
        original = subject.by_name.get(node.meta[CLONE_OF])
        if original is not None:
            for key in ("stack_trace", "nn_module_stack"):
                if node.meta.get(key) != original.meta.get(key):
                    yield node, f"has not the {key} of {original.name}"


CHECKS: tuple[Check, ...] = tuple(
    Check(function.__name__, function.__doc__ or "", function)
    for function in (
        lint,
        signature,
        values,
        phases,
        draws,
        collectives,
        recomputed,
        transfers,
        writes,
        gradients,
        origins,
    )
)


def known_origins(graph: TrainGraph) -> float:
    """Share of the forward's operations with a source line and a module."""
    subject = Subject(graph, scheduled=False)
    forward = [node for node in subject.calls if not subject.in_backward(node)]
    known = [n for n in forward if n.meta.get("stack_trace") and n.meta.get("nn_module_stack")]
    return len(known) / len(forward) if forward else 1.0


def check_split(split: Split) -> None:
    """Checks that the two halves of a step fit together.

    Raises:
        GraphLawError: the backward does not take what the forward saves, or never reads it.
    """
    made: Any = split.forward.graph.output_node().args[0]
    made = made[split.output_count :]
    taken, _, _ = split.backward_inputs()
    findings: list[Finding] = []
    if not len(made) == len(taken) == len(split.saved):
        findings.append((None, f"{len(made)} values saved, {len(taken)} of {split.saved} taken"))
    for source, node in zip(made, taken, strict=False):
        findings += _compare(node, "saved value", source, "what the forward saves")
        if not node.users:
            findings.append((node, "is saved and never read"))
    if findings:
        lines = [str(Violation("split", *finding)) for finding in findings]
        raise GraphLawError("\n  ".join(["the forward and the backward do not fit", *lines]))


def _compare(node: Any, what: str, other: Any, name: str) -> Iterator[Finding]:
    """A finding unless two nodes' values agree in shape, dtype and device."""
    mine, theirs = (_kind(n.meta.get("val")) for n in (node, other))
    if mine != theirs:
        yield node, f"{what} is {mine}, {name} {other.name} is {theirs}"


def _kind(value: Any) -> str:
    return f"{describe(value)} on {', '.join(str(t.device) for t in tensor_leaves(value))}"


def _layout(value: Any) -> str:
    """Shapes, dtypes, strides and devices; only a stride that moves counts."""
    strides = [
        [step if size > 1 else 0 for size, step in zip(t.shape, t.stride(), strict=True)]
        for t in tensor_leaves(value)
    ]
    return f"{_kind(value)}, strides {strides}"


def _derive(node: fx.Node, mode: _torch.FakeTensorMode) -> Any:
    """The node's value, computed from its arguments' values."""
    given: Any = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    args, kwargs = given
    target = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    with mode, torch.no_grad():
        if target is randomness.draw:
            return node.meta["val"][0], args[0](*args[1:], **kwargs)
        if target is randomness.draw_again:
            return args[1](*args[2:], **kwargs)
        assert callable(target)
        return target(*args, **kwargs)


def _returns_nothing(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and not target._schema.returns


def _call(node: fx.Node) -> tuple[Any, str]:
    """The operator that a node stands for and its constants, seen through ``draw``."""
    target: Any = node.target
    args: Any = node.args
    if target is operator.getitem and args[0].target is randomness.draw:
        return _call(args[0])
    if target is randomness.draw:
        target, args = args[0], args[1:]
    elif target is randomness.draw_again:
        target, args = args[1], args[2:]
    return target, str(fx.map_arg((args, node.kwargs), lambda _: "%"))


def _replays_original(subject: Subject, node: fx.Node) -> Iterator[Finding]:
    """What is wrong with the state from which a ``draw_again`` runs."""
    state: Any = node.args[0]
    source = state.args[0] if state.target is operator.getitem else None
    if source is None or source.target is not randomness.draw or state.args[1] != 0:
        yield node, f"runs from {state.name}, which is no state that a draw saved"
        return
    results = {user.name for user in source.users if user.args[1] == 1}
    if node.meta.get(CLONE_OF) not in results:
        yield node, f"recomputes {node.meta.get(CLONE_OF)} from the state of {sorted(results)}"


def _namespace(node: fx.Node) -> str:
    return getattr(node.target, "namespace", "")


def _surroundings(graph: TrainGraph, node: fx.Node | None) -> list[str]:
    """The graph's text around a node."""
    nodes = list(graph.graph.nodes)
    if node not in nodes:
        return []
    at = nodes.index(node)
    shown = nodes[max(at - _CONTEXT_LINES, 0) : at + _CONTEXT_LINES + 1]
    lines = zip(shown, format_nodes(graph, shown), strict=True)
    return ["", *(f"{'>' if item is node else ' '} {line}" for item, line in lines)]
