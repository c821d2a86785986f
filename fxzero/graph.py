"""The joint graph with its roles: which input is a parameter, which output a gradient.

A TrainGraph is an ``fx.GraphModule`` over flat tensors, in execution order, forward nodes first:

    placeholders   parameters, buffers, inputs, tangents, existing gradients
    forward nodes  ...
    backward nodes ...
    output         [model outputs, buffer updates, gradients]

Passes return a new TrainGraph; the graph behind an old one may have been rewritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxzero import _torch


@dataclass(frozen=True)
class InputRole:
    """What a placeholder is.

    Attributes:
        kind: "parameter", "buffer", "input", "tangent"; "gradient": that of a parameter, as it is
            before the step; or "gathered": a sharded parameter as it is when whole.
        name: qualified name of a parameter (also of a gradient's) or buffer; "" otherwise.
        index: position among the model's flat inputs (input) or flat outputs (tangent); else -1.
    """

    kind: str
    name: str = ""
    index: int = -1


@dataclass(frozen=True)
class OutputRole:
    """What an output is: "output" (by index), "mutation" or "gradient" (of an input), "absent"."""

    kind: str
    index: int = -1
    of: InputRole | None = None


@dataclass(frozen=True)
class TrainGraph:
    """A joint graph and the roles of its inputs and outputs, in their order."""

    module: fx.GraphModule
    inputs: tuple[InputRole, ...]
    outputs: tuple[OutputRole, ...]

    @classmethod
    def from_joint(
        cls, joint: fx.GraphModule, rename: Callable[[str], str] = lambda name: name
    ) -> TrainGraph:
        """Reads the roles from the descriptors that AOTAutograd leaves on a joint graph."""

        def role(described: tuple[str, Any]) -> InputRole:
            kind, which = described
            return (
                InputRole(kind, name=rename(which))
                if isinstance(which, str)
                else InputRole(kind, index=which)
            )

        outputs = [
            OutputRole(kind, index=which)
            if kind == "output"
            else OutputRole(kind, of=role(which) if which else None)
            for kind, which in _torch.describe_outputs(joint)
        ]
        inputs = [role(_torch.describe_input(n)) for n in joint.graph.find_nodes(op="placeholder")]
        return cls(joint, tuple(inputs), tuple(outputs))

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def results(self) -> list[Any]:
        """The output node's arguments: nodes, or None for an absent gradient."""
        (output,) = self.graph.find_nodes(op="output")
        return list(output.args[0])

    def pairs(self) -> Iterator[tuple[InputRole, fx.Node]]:
        """Every placeholder with its role."""
        return zip(self.inputs, self.placeholders, strict=True)

    def result_pairs(self) -> Iterator[tuple[OutputRole, Any]]:
        """Every output with its role."""
        return zip(self.outputs, self.results, strict=True)

    @property
    def trainable(self) -> frozenset[InputRole]:
        """Roles of the parameters that receive a gradient."""
        return frozenset(
            role.of
            for role, value in self.result_pairs()
            if role.kind == "gradient" and value is not None
            if role.of is not None and role.of.kind == "parameter"
        )

    @property
    def accumulates(self) -> bool:
        """Whether gradients are added to those that exist."""
        return any(role.kind == "gradient" for role in self.inputs)

    def with_module(self, module: fx.GraphModule) -> TrainGraph:
        return replace(self, module=module)

    def copy(self) -> TrainGraph:
        """The same nodes under the same names, to rewrite; values are shared."""
        return self.with_module(_torch.copy_module(self.module))

    def is_backward(self, node: fx.Node) -> bool:
        """Whether the node runs in the backward; placeholders other than tangents do not."""
        return _torch.is_backward_node(node)

    def digest(self) -> str:
        """Hash of operators, wiring, shapes and dtypes: equal for equal graphs on any machine."""
        order: dict[fx.Node, int] = {}
        text = hashlib.sha256()
        for node in self.graph.nodes:
            order[node] = len(order)
            args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{order[n]}")
            text.update(
                f"{node.op} {node.target} {args} {describe(node.meta.get('val'))}\n".encode()
            )
        text.update(repr((self.inputs, self.outputs)).encode())
        return text.hexdigest()[:16]


def describe(value: Any) -> str:
    """'f32[8, 64]' for a tensor, a tuple of them for a tuple, repr otherwise."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return repr(value)


def describe_all(values: Iterable[Any]) -> str:
    """``describe`` of each value, in one line."""
    return ", ".join(map(describe, values))
