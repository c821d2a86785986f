"""Turns a forward and a backward graph into functions that run: eagerly or through Inductor.

Where both are generated, what the forward saves has the layout that its kernels like, and the
backward is generated for that; operators that run one by one get what the graph says.

Under a budget, code that Inductor generated runs only if its rehearsed peak stays within it.  Each
of the two graphs takes the first of these ways that does:

    Inductor
    Inductor that fuses only what passes a value on
    operator by operator, whose peak is the planned one
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from fxzero import _inductor, _torch, randomness
from fxzero.accumulation import Accumulated, Layout
from fxzero.collectives import bind, starts_transfer
from fxzero.execution import BoxedFunction, compile_to_python
from fxzero.passes.split_backward import split_backward
from fxzero.rehearsal import Peaks
from fxzero.runtime import Executable, Halves, Owner
from fxzero.updating import UPDATE

if TYPE_CHECKING:
    from fxzero.passes.partition import Split

log = logging.getLogger(__name__)

Rehearse = Callable[[BoxedFunction, BoxedFunction], Peaks]


@dataclass(frozen=True)
class Code:
    """The two functions of a step.

    Attributes:
        halves: the backward once more, in two parts; None: it is one.
        apart: "forward", "backward": which run operator by operator though code was asked for.
    """

    forward: BoxedFunction
    backward: BoxedFunction
    halves: Halves | None = None
    apart: frozenset[str] = frozenset()


def generate(
    split: Split,
    inner: str,
    *,
    limit: int | None,
    rehearse: Rehearse,
    groups: Mapping[str, str] | None = None,
    in_halves: bool = False,
) -> Code:
    """Functions for the two graphs.

    Args:
        inner: "eager" runs node by node, "inductor" generates code.
        limit: bytes that generated code may reach; None: any.
        rehearse: the peaks of two functions.
        groups: the process group behind each dimension of the mesh.
        in_halves: whether the backward may run in two parts; then no limit is kept to.
    """
    split = bound(split, groups or {})
    if in_halves:
        halves = _compile_halves(split, inner)
        forward = compile_graph(split.forward, inner, backward=False)
        return Code(forward, halves.whole, halves=halves)
    if inner == "eager":
        return replace(_pair(split, inner, inner), apart=frozenset())
    if limit is None:
        return _pair(split, inner, inner)
    return generate_within(split, limit, rehearse)


def _pair(split: Split, forward: str, backward: str) -> Code:
    """The two functions, each by its inner compiler."""
    inners = {"forward": forward, "backward": backward}
    apart = frozenset(name for name, inner in inners.items() if inner == "eager")
    if apart:
        return Code(
            compile_graph(split.forward, forward, backward=False),
            compile_graph(split.backward, backward, backward=True),
            apart=apart,
        )
    first = compile_graph(split.forward, forward, backward=False, kept=split.output_count)
    strides = _inductor.strides_of_results(first)[split.output_count :]
    return Code(first, compile_graph(split.backward, backward, backward=True, given=strides))


def executable(
    split: Split, code: Code, inner: str, *, attached: tuple[int, ...], owner: Owner
) -> Executable:
    """An Executable of the functions of two graphs.

    Args:
        inner: the compiler that made them, "eager" or "inductor".
        attached: outputs that autograd must know besides those with a tangent.
        owner: told what each backward shows.
    """
    names = [node.name for node in split.forward.graph.find_nodes(op="placeholder")]
    return Executable(
        forward=code.forward,
        backward=code.backward,
        output_count=split.output_count,
        differentiable=split.tangents,
        attached=attached,
        saved_inputs=tuple(names.index(n) if n in names else None for n in split.saved),
        accumulated=tuple(
            Accumulated(position, Layout.of(node.meta["val"]))
            for position, node in zip(split.accumulated, split.backward_inputs()[1], strict=True)
        ),
        updated=_updated(split),
        gradients=split.gradients,
        reached=_reached(split),
        owner=owner,
        strided=inner != "eager",
        halves=code.halves,
    )


def _compile_halves(split: Split, inner: str) -> Halves:
    parts = split_backward(split.backward, split.input_gradients)
    return Halves(
        first=compile_graph(parts.input_part, inner, backward=True),
        second=compile_graph(parts.weight_part, inner, backward=True),
        first_takes=parts.input_takes,
        second_takes=parts.weight_takes,
        first_returns=parts.input_returns,
        second_returns=parts.weight_returns,
        inputs=tuple(i for i, role in enumerate(split.inputs) if role.kind == "input"),
    )


def bound(split: Split, groups: Mapping[str, str]) -> Split:
    """The same graphs with process groups in the place of the mesh's dimensions."""
    if not groups:
        return split
    forward, backward = (_torch.copy_module(m) for m in (split.forward, split.backward))
    bind(forward, groups)
    bind(backward, groups)
    return replace(split, forward=forward, backward=backward)


def generate_within(split: Split, limit: int, rehearse: Rehearse) -> Code:
    """A forward and a backward through Inductor that stay within ``limit`` bytes.

    Args:
        split: graphs whose operators, run one by one, stay within it.
        rehearse: the peaks of two functions.
    """
    forward = backward = "inductor"
    code = _pair(split, forward, backward)
    peaks = rehearse(code.forward, code.backward)
    for inner in ("inductor in order", "eager"):
        if peaks.largest <= limit:
            return code
        log.info("generated code needs %s of %d bytes: %s", peaks, limit, inner)
        forward = inner if peaks.forward > limit else forward
        backward = inner if peaks.backward > limit else backward
        code = _pair(split, forward, backward)
        peaks = rehearse(code.forward, code.backward)
    if peaks.largest <= limit:
        return code
    # What the forward leaves is larger than planned, so that no backward has room.
    return _pair(split, "eager", "eager")


def compile_graph(
    module: fx.GraphModule,
    inner: str,
    *,
    backward: bool,
    kept: int | None = None,
    given: Sequence[_inductor.Strides | None] | None = None,
) -> BoxedFunction:
    """A function over a list of arguments, which it empties, that runs one graph.

    Args:
        inner: "eager", "inductor", or "inductor in order", which fuses neighbours only.
        kept: how many of the first results have the strides of the graph; None: all.
        given: strides of the first arguments, where they are not those of the graph.
    """
    if inner == "eager" or all(node.op != "call_function" for node in module.graph.nodes):
        return compile_to_python(module)
    return _inductor.compile_with_inductor(
        module,
        _inductor_target,
        backward=backward,
        kept=kept,
        given=given,
        side_by_side=inner == "inductor",
        in_order=any(starts_transfer(node.target) for node in module.graph.nodes),
    )


def _inductor_target(target: Any) -> Any:
    """Our functions that draw random numbers, as the operators of torch that Inductor knows."""
    if target is randomness.draw:
        return _torch.run_and_save_rng_state
    return _torch.run_with_rng_state if target is randomness.draw_again else target


def _updated(split: Split) -> dict[str, int]:
    """By name, positions among the inputs of parameters that the backward updates."""
    positions = {r.name: i for i, r in enumerate(split.inputs) if r.kind == "parameter"}
    names = [str(n.args[2]) for n in split.backward.graph.nodes if n.target is UPDATE]
    return {name: positions[name] for name in names}


def _reached(split: Split) -> dict[int, frozenset[int]]:
    """For each output with a tangent, which gradients depend on it."""
    graph = split.backward.graph
    *_, tangents = split.backward_inputs()
    depends: dict[fx.Node, frozenset[int]] = {
        node: frozenset([index]) for node, index in zip(tangents, split.tangents, strict=True)
    }
    for node in graph.nodes:
        if node.op == "call_function":
            sources = (depends.get(source, frozenset()) for source in node.all_input_nodes)
            depends[node] = frozenset[int]().union(*sources)
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    return {
        index: frozenset(i for i, node in enumerate(results) if index in depends.get(node, ()))
        for index in split.tangents
    }
