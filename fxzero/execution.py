"""Runs a graph node by node with memory freed at each value's last use.

The graph is written out as one Python function over a list of arguments that it empties
("boxed"): no frame keeps an argument or a value longer than the graph needs it, which is what
the memory timeline assumes.

    def run(args):
        x, w, = args; args.clear()
        h = op0(x, w); w = None
        return [h]
"""

from __future__ import annotations

import math
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero.collectives import in_transfer

BoxedFunction = Callable[[list[Any]], list[Any]]

_SOURCE = "__fxzero_source__"


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nothing reads after it ran.

    Values that nothing ever reads die with the node that makes them; results never die.  Inputs
    that nothing reads are listed under the first node that is not an input.  What a collective
    reads lives until it is waited for.
    """
    nodes = list(graph.nodes)
    first = next(node for node in nodes if node.op != "placeholder")
    last: dict[fx.Node, fx.Node] = {n: first if n.op == "placeholder" else n for n in nodes}
    for node in nodes:
        for source in (*node.all_input_nodes, *in_transfer(node)):
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, at in last.items():
        if at.op != "output":
            dying[at].append(node)
    return dying


def compile_to_python(module: fx.GraphModule) -> BoxedFunction:
    """One Python function that runs the graph; its source is in ``function.__source__``."""
    writer = _Writer(module)
    source = writer.write()
    filename = f"<fxzero graph {id(module):x}>"
    exec(compile(source, filename, "exec"), writer.namespace)
    function: BoxedFunction = writer.namespace["run"]
    function.__source__ = writer.namespace[_SOURCE] = source  # type: ignore[attr-defined]
    return function


def source_of(frame: types.FrameType) -> str | None:
    """The source of a function of ``compile_to_python`` that a frame runs; None of any other."""
    source: str | None = frame.f_globals.get(_SOURCE)
    return source


class _Writer:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.namespace: dict[str, Any] = {}
        self._constants: dict[int, str] = {}

    def write(self) -> str:
        graph = self.module.graph
        inputs = [node.name for node in graph.find_nodes(op="placeholder")]
        lines = ["def run(args):"]
        if inputs:
            lines.append(f"    {', '.join(inputs)}, = args")
        lines.append("    args.clear()")
        dying = last_uses(graph)
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"    return [{', '.join(self._text(v) for v in node.args[0])}]")
                continue
            dead = [value.name for value in dying.get(node, ()) if value is not node]
            if dead:
                release = f"; {' = '.join(dead)} = None"
            else:
                release = ""
            if statement := self._statement(node):
                lines.append(f"    {statement}{release}")
            elif release:
                lines.append(f"    {release.removeprefix('; ')}")
        return "\n".join(lines) + "\n"

    def _statement(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return ""
        if node.op == "get_attr":
            assert isinstance(node.target, str)
            return f"{node.name} = {self._constant(_attribute(self.module, node.target))}"
        arguments = [self._text(value) for value in node.args]
        arguments += [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        call = f"{self._constant(node.target)}({', '.join(arguments)})"
        return f"{node.name} = {call}" if node.users else call

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if value is None or (
            isinstance(value, (bool, int, str)) and type(value).__module__ == "builtins"
        ):
            return repr(value)
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        if type(value) is slice:
            bounds = (value.start, value.stop, value.step)
            return f"slice({', '.join(map(self._text, bounds))})"
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            items = ", ".join(self._text(item) for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items},)" if items else "()"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self._text(v)}" for k, v in value.items()) + "}"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = self._constants.get(id(value))
        if name is None:
            name = self._constants[id(value)] = f"c{len(self._constants)}_"
            self.namespace[name] = value
        return name


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
