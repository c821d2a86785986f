"""What each operator of a row costs in training: time forwards and backwards.

The whole model is traced once with its backward.  Every node of that graph, the backward's too,
knows the forward operator that it came from, so prices of nodes add up to prices of operators, and
those to prices of any stage that a cut would make.

    linear    F addmm 5 ms    I mm 5 ms    W mm 5 ms, sum 1 ms
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx

from fxzero import _torch
from fxzero.capture import join
from fxzero.cost import CostModel
from fxzero.graph import TrainGraph
from fxzero.pipelining.cutting import Row
from fxzero.pipelining.schedules import StageTimes
from fxzero.pipelining.stages import Exports

_MARK = "fxzero_operator"


@dataclass(frozen=True)
class Profile:
    """Sums over the operators before each position of a row; entry i is that of the first i.

    Attributes:
        graph: the whole model with its backward, whose nodes ``origins`` knows.
        forward: seconds.
        input_gradient: seconds of the backward that the stage before waits for.
        weight_gradient: seconds of the rest of it.
    """

    graph: TrainGraph
    forward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]

    def times(self, start: int, stop: int) -> StageTimes:
        """The seconds of a stage of these operators."""
        return StageTimes(
            self.forward[stop] - self.forward[start],
            self.input_gradient[stop] - self.input_gradient[start],
            self.weight_gradient[stop] - self.weight_gradient[start],
        )

    @property
    def operators(self) -> int:
        """How many the row has."""
        return len(self.forward) - 1


def profile(exports: Exports, inner: str, costs: CostModel) -> Profile:
    """Traces a model with its backward and prices its operators."""
    row = exports.row
    module = _torch.copy_module(exports.exported.forward)
    positions = {node.name: index for index, node in enumerate(row.work)}
    for node in module.graph.nodes:
        if node.name in positions:
            marks = {**(node.meta.get("custom") or {}), _MARK: positions[node.name]}
            node.meta = {**node.meta, "custom": marks}
    graph = join(module, exports.exported.leaves, inner, exports.name)
    origin = origins(graph)
    forward, early, late = ([0.0] * len(row.work) for _ in range(3))
    trailing = _of_weights(graph, origin)
    for node, at in origin.items():
        if not graph.is_backward(node):
            kind = forward
        else:
            kind = late if node in trailing else early
        kind[at] += costs.price(node).seconds
    parameters = dict(exports.exported.forward.named_parameters(remove_duplicate=False))
    for name, places in weights_of(row).items():
        if name in parameters:  # added to the gradient of earlier micro-batches
            late[places[0]] += 3 * parameters[name].nbytes / costs.hardware.bandwidth * costs.scale
    return Profile(
        graph=graph,
        forward=tuple(accumulate(forward, initial=0.0)),
        input_gradient=tuple(accumulate(early, initial=0.0)),
        weight_gradient=tuple(accumulate(late, initial=0.0)),
    )


def origins(graph: TrainGraph) -> dict[fx.Node, int]:
    """The position of the operator that each node was traced for.

    Sums of gradients have no mark; they belong to the operator whose backward came before.
    """
    found: dict[fx.Node, int] = {}
    last = 0
    for node in graph.graph.nodes:
        if node.op == "call_function":
            last = (node.meta.get("custom") or {}).get(_MARK, last)
            found[node] = last
    return found


def weights_of(row: Row) -> dict[str, list[int]]:
    """For each parameter and buffer, the positions of the operators that read it."""
    found: dict[str, list[int]] = {}
    for position, names in enumerate(row.weights_read):
        for name in names:
            found.setdefault(name, []).append(position)
    return found


def _of_weights(graph: TrainGraph, origin: dict[fx.Node, int]) -> set[fx.Node]:
    """Nodes of the backward that nothing but gradients of the same operator's weights needs.

    Sums over several uses of a weight need them too: those of tied weights.
    """
    found: set[fx.Node] = set()
    sums: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node in origin and graph.is_backward(node):
            users = [user for user in node.users if user.op != "output" and user not in sums]
            if node.target is torch.ops.aten.add.Tensor and not users:
                sums.add(node)
            if all(user in found and origin[user] == origin[node] for user in users):
                found.add(node)
    return found
