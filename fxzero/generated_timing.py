"""Times the code that Inductor generates for a whole step, against its operators one by one.

An operator inside a fused kernel takes less than alone, one behind a copy into another layout more;
neither can be seen in the operator.  So the step without a budget is generated once, and run in
turn with the operators of the same model, so that a change of the machine's speed meets both:

    operators one by one      as calibrated 120 ms     now 126 ms
    the code generated        by its operators 110     now 104     0.90 of what was calibrated
    its operators apart       by roofline      150     now 189     1.20

Plans of the same graph for generated code have so much of their times, whatever they recompute:
the first share where they run code, the second where a budget has its operators run one by one.
What the code calls, convolutions in a layout of its own say, is measured for its workspace.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fxzero import _inductor
from fxzero.cost import CostModel, Shares
from fxzero.graph import TrainGraph
from fxzero.inner import Code, generate
from fxzero.options import check_options
from fxzero.passes.partition import Split
from fxzero.planner import Planner
from fxzero.timing import (
    REFUSALS,
    Calls,
    Watch,
    example,
    fits,
    rounds_of_a_graph,
    run_in_order,
    workspaces_alone,
)


@dataclass(frozen=True)
class GeneratedTimes:
    """What was measured of the code of one step.

    Attributes:
        shares: of the times that its operators' prices come to.
        workspaces: bytes by ``cost.operator_key`` that operators which it calls take while they
            run.
    """

    shares: Shares
    workspaces: dict[str, int]


def time_generated(
    graph: TrainGraph, decomposed: TrainGraph, device: str, costs: CostModel
) -> GeneratedTimes | None:
    """Runs a step of generated code in turn with the operators of the same model.

    Args:
        graph, decomposed: one model's, captured for operators one by one and for generated code.
        device: "cpu" or "cuda", on which both run several times on numbers made up.
        costs: as calibrated, for single operators.

    Returns:
        None without a compiler, where the graph is too large for the device, or where one of its
        operators refuses.
    """
    if not _inductor.has_compiler(device) or not fits(decomposed.graph, device):
        return None
    options = check_options(device=device, optimizer="none", inner="inductor")
    planner = Planner(decomposed, options, "calibration")
    decided = planner.decide()
    split = decided.emitted.split
    code = generate(
        split, "inductor", limit=None, rehearse=functools.partial(planner.rehearse, decided)
    )
    run = functools.partial(_seconds, split, code, _inputs(split, device), device)
    code_ratios, apart_ratios = [], []
    try:
        with Calls() as calls:
            run()
        for _ in rounds_of_a_graph():
            alone = sum(run_in_order(graph, device).values())
            code_ratios.append(run() / alone)
            apart_ratios.append(sum(run_in_order(decomposed, device).values()) / alone)
    except REFUSALS:
        return None
    by_operators = _priced(graph.graph.nodes, costs)
    nodes = (*split.forward.graph.nodes, *split.backward.graph.nodes)
    shares = Shares(
        statistics.median(code_ratios) * by_operators / _priced(nodes, replace(costs, fused=True)),
        statistics.median(apart_ratios) * by_operators / _priced(decomposed.graph.nodes, costs),
    )
    unknown = {key: call for key, call in calls.made.items() if key not in costs.measured}
    return GeneratedTimes(shares, workspaces_alone(unknown, device))


def _priced(nodes: Iterable[fx.Node], costs: CostModel) -> float:
    return sum(costs.price(node).seconds for node in nodes)


def _inputs(split: Split, device: str) -> tuple[list[Any], list[Any]]:
    """Arguments of the forward, and of the backward what a loss would send."""
    return (
        _examples(split.forward.graph.find_nodes(op="placeholder"), device),
        _examples(split.backward_inputs()[2], device),
    )


def _examples(nodes: Iterable[fx.Node], device: str) -> list[Any]:
    return [example(node.meta.get("val"), device) for node in nodes]


def _seconds(split: Split, code: Code, given: tuple[list[Any], list[Any]], device: str) -> float:
    inputs, tangents = given
    watch = Watch(device)
    results = code.forward(list(inputs))
    outputs, saved = results[: split.output_count], results[split.output_count :]
    results.clear()
    arguments = [*saved, *tangents]
    saved.clear()
    gradients = code.backward(arguments)
    watch.stop()
    del outputs, gradients  # a caller holds them until now
    return watch.seconds()
