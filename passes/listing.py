"""A graph as text: one line a node, for dumps, for error messages and for tests.

Fields: name, operator and arguments, value, role (F or B), module, source line.

    relu  aten.relu.default(mm)  float32[8, 64]  F  blocks.0  model.py:41 in forward: relu(x)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxzero.capture import user_line
from fxzero.graph import InputRole, TrainGraph, describe


def format_graph(graph: TrainGraph) -> str:
    """Every node in order."""
    return "\n".join(format_nodes(graph, graph.graph.nodes)) + "\n"


def format_nodes(graph: TrainGraph, nodes: Iterable[fx.Node]) -> list[str]:
    """A line for each of some nodes; fields that are not known are left out."""
    inputs = dict(zip(graph.placeholders, graph.inputs, strict=False))
    lines = []
    for node in nodes:
        fields = [node.name, _input(inputs[node]) if node in inputs else format_call(node)]
        if node.op != "output":
            role = "B" if graph.is_backward(node) else "F"
            value = describe(node.meta.get("val"))
            fields += [value, role, module_of(node), user_line(node) or ""]
        lines.append("  ".join(text for text in fields if text))
    return lines


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost module that made the node; "" where that is not known."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path, _ = next(reversed(stack.values()), ("", None))
    return "" if path == "model" else str(path).removeprefix("model.")


def _input(role: InputRole) -> str:
    return f"{role.kind} {role.name or role.index}"


def format_call(node: fx.Node) -> str:
    """The node's operator and arguments."""
    if node.op in ("placeholder", "get_attr"):
        return node.op
    name = "output" if node.op == "output" else _operator(node.target)
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _argument(value: object) -> str:
    """Like repr, but functions go by name: their repr has an address in it."""
    if isinstance(value, (list, tuple)):
        items = ", ".join(_argument(item) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    return _operator(value) if callable(value) else str(value)


def _operator(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return str(getattr(target, "__name__", target))
