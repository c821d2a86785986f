"""What other ways of saving activation memory come to on the same joint graph, without running it.

Every plan is a forward and a backward graph; its peak is the timeline's, its recompute cost the sum
over the same per-operator prices.  Only the choice of what to recompute differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition

from fxzero.graph import TrainGraph
from fxzero.passes.partition import Split
from fxzero.timeline import Surroundings, simulate

Price = Callable[[fx.Node], float]
TORCH_SOLVERS = ("dp", "greedy", "ilp")


@dataclass(frozen=True)
class Outcome:
    """Peak bytes of the whole step, and the price of what runs more than once."""

    name: str
    peak: int
    price: float


def torch_budget(
    graph: TrainGraph, surroundings: Surroundings, price: Price, *, solver: str, budget: float
) -> Outcome:
    """The plan of ``activation_memory_budget`` for a joint graph."""
    joint = graph.copy()
    with functorch_config.patch(
        activation_memory_budget=budget, activation_memory_budget_solver=solver
    ):
        forward, backward = min_cut_rematerialization_partition(
            joint.module,
            [node.meta["val"] for node in joint.graph.find_nodes(op="placeholder")],
            num_fwd_outputs=sum(role.kind in ("output", "mutation") for role in joint.outputs),
        )
    split = _as_split(graph, forward, backward)
    # Torch drops common subexpressions first; what that spares is no recompute.
    once = _total(fx_graph_cse(graph.copy().graph).nodes, price)
    twice = _total((*forward.graph.nodes, *backward.graph.nodes), price)
    return Outcome(
        f"torch {solver} {budget:g}", simulate(split, surroundings).peak_bytes, twice - once
    )


def _total(nodes: Iterable[fx.Node], price: Price) -> float:
    return sum(price(node) for node in nodes if node.op == "call_function")


def _as_split(graph: TrainGraph, forward: fx.GraphModule, backward: fx.GraphModule) -> Split:
    """Torch's two graphs in our terms; only what the timeline reads has to be right."""
    by_name = {node.name: role for role, node in graph.pairs()}
    inputs = [by_name[node.name] for node in forward.graph.find_nodes(op="placeholder")]
    count = sum(role.kind in ("output", "mutation") for role in graph.outputs)
    taken = [node.name for node in backward.graph.find_nodes(op="placeholder")]
    saved = [name for name in taken if not _is_tangent(by_name.get(name))]
    _drop_missing_gradients(backward)
    return Split(
        forward=forward,
        backward=backward,
        inputs=tuple(inputs),
        output_count=count,
        saved=tuple(saved),
        tangents=tuple(range(len(taken) - len(saved))),
        gradients=(),
        mutated=(),
        accumulated=(),
    )


def _is_tangent(role: object) -> bool:
    return getattr(role, "kind", None) == "tangent"


def _drop_missing_gradients(backward: fx.GraphModule) -> None:
    (output,) = backward.graph.find_nodes(op="output")
    output.args = (tuple(node for node in output.args[0] if isinstance(node, fx.Node)),)
