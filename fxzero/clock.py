"""The time of a step whose collectives run beside operators until they are waited for.

Operators run one after the other, and so do collectives, on links of their own.  A wait holds
operators up until its collective has ended; one that has ended by then costs nothing but what it
takes from operators that run beside it, where they share cores or memory.

    start g1 | op | op | wait g1        operators   ==op====op==......|
                                        links       ======g1==========|     "....": exposed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from fxzero.collectives import collective_of, is_collective, is_gather, is_wait
from fxzero.cost import CostModel, NodeCost
from fxzero.graph import TrainGraph

# A gather that operators hide costs this share of its time, so that none is free.
_LEAST_EXPOSED = 0.02


@dataclass(frozen=True)
class Elapsed:
    """Modelled seconds of a step.

    Attributes:
        step: from its first operator to its last.
        communication: all collectives, by themselves.
        exposed: how long operators stand still for collectives.
        starts: when each node begins.
    """

    step: float
    communication: float
    exposed: float
    starts: Mapping[fx.Node, float] = field(default_factory=dict, repr=False, compare=False)


def elapsed(
    graphs: Iterable[fx.Graph], price: Callable[[fx.Node], NodeCost], overlap: float = 1.0
) -> Elapsed:
    """The time of graphs that run one after the other.

    Args:
        price: what a node that calls a function costs by itself.
        overlap: the share of a collective's time that operators hide; they stand still for the
            rest of it.
    """
    now = idle_from = communication = exposed = 0.0
    ends: dict[fx.Node, float] = {}
    starts: dict[fx.Node, float] = {}
    for graph in graphs:
        for node in graph.nodes:
            starts[node] = now
            if node.op != "call_function":
                continue
            seconds = price(node).seconds
            if is_collective(node):
                communication += seconds
                ends[node] = idle_from = max(now, idle_from) + seconds
                exposed += (1 - overlap) * seconds
                now += (1 - overlap) * seconds
            elif is_wait(node):
                wait = max(ends.get(collective_of(node), now) - now, 0.0)
                exposed += wait
                now += wait
            else:
                now += seconds
    return Elapsed(now, communication, exposed, starts)


def exposed_share(graph: TrainGraph, costs: CostModel) -> float:
    """What share of its time a gather costs that the backward does again, 1 at most.

    Gathers and reductions run beside the backward's operators, which hide as much of them as they
    take themselves; what is left is spread over all gathers.

    Args:
        graph: a joint graph without recompute.
    """
    if not any(map(is_gather, graph.graph.nodes)):
        return 1.0
    operators = collectives = gathers = 0.0
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        seconds = costs.price(node).seconds
        if is_gather(node):
            gathers += seconds
        elif is_collective(node):
            collectives += seconds
        elif graph.is_backward(node):
            operators += seconds
    transfers = gathers + collectives
    left = max(transfers - operators, (1 - costs.overlap) * transfers)
    return min(max(left / gathers, _LEAST_EXPOSED), 1.0)
