"""Turns a forward and a backward graph into functions that run: eagerly or through Inductor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxzero import _torch, randomness
from fxzero.execution import BoxedFunction, compile_to_python
from fxzero.runtime import Executable, Owner

if TYPE_CHECKING:
    from fxzero.passes.partition import Split


def compile_split(
    split: Split, inner: str, *, attached: tuple[int, ...], owner: Owner
) -> Executable:
    """An Executable for the two graphs.

    Args:
        inner: "eager" runs node by node, "inductor" generates code.
        attached: outputs that autograd must know besides those with a tangent.
        owner: told what each backward shows.
    """
    names = [node.name for node in split.forward.graph.find_nodes(op="placeholder")]
    return Executable(
        forward=compile_graph(split.forward, inner, backward=False),
        backward=compile_graph(split.backward, inner, backward=True),
        output_count=split.output_count,
        differentiable=split.tangents,
        attached=attached,
        saved_inputs=tuple(names.index(n) if n in names else None for n in split.saved),
        gradients=split.gradients,
        reached=_reached(split),
        owner=owner,
    )


def compile_graph(module: fx.GraphModule, inner: str, *, backward: bool) -> BoxedFunction:
    """A function over a list of arguments, which it empties, that runs one graph."""
    if inner == "eager":
        return compile_to_python(module)
    return _torch.compile_with_inductor(module, _inductor_target, backward=backward)


def _inductor_target(target: Any) -> Any:
    """Our functions that draw random numbers, as the operators of torch that Inductor knows."""
    if target is randomness.draw:
        return _torch.run_and_save_rng_state
    return _torch.run_with_rng_state if target is randomness.draw_again else target


def _reached(split: Split) -> dict[int, frozenset[int]]:
    """For each output with a tangent, which gradients depend on it."""
    graph = split.backward.graph
    tangents = list(graph.find_nodes(op="placeholder"))[len(split.saved) :]
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
