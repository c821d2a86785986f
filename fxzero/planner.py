"""Decides: from a captured graph and a budget to a Plan and the two graphs that carry it out.

Merging equal operations makes another graph; each is planned by itself (``graph_planner.py``), and
the better plan is taken.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from fxzero.calibration import cost_model
from fxzero.errors import BudgetError, PlanError
from fxzero.execution import BoxedFunction
from fxzero.garbage import no_collections
from fxzero.graph import TrainGraph
from fxzero.graph_planner import Decided, GraphPlanner
from fxzero.options import Options, device_of
from fxzero.passes.pipeline import Pass
from fxzero.plans import Plan
from fxzero.rehearsal import Peaks
from fxzero.storages import analyse
from fxzero.timeline import simulate

# Merged values below this share of what the forward makes are not worth planning twice.
_SMALL_SHARE = 1 / 400


class Planner:
    """Plans one captured graph for any number of budgets; the graph itself is never changed.

    Merging equal operations saves memory where their values are kept, and costs some where they
    would not be, so both graphs are planned and the better plan is taken.

    Args: those of ``GraphPlanner``.
    """

    @no_collections()
    def __init__(self, graph: TrainGraph, options: Options, name: str, **given: Any) -> None:
        costs = cost_model(
            device_of([node.meta["val"] for _, node in graph.pairs()]),
            fused=options.inner == "inductor",
            graph=graph,
            hardware=options.hardware,
            mesh=options.ranks,
        )
        preparation = options.passes.preparation
        merged = GraphPlanner(graph, options, name, preparation, costs, **given)
        self.variants: tuple[GraphPlanner, ...] = (merged,)
        if _merged_share(graph, merged.graph) > _SMALL_SHARE:
            unmerged = tuple(item for item in preparation if item.name != "deduplicate")
            self.variants += (GraphPlanner(graph, options, name, unmerged, costs, **given),)

    @property
    def outputs_held(self) -> bool:
        return self.variants[0].outputs_held

    @property
    def digest(self) -> str:
        """Hash of the graph that is planned: equal where the same model is traced."""
        return self.variants[0].digest

    @no_collections()
    def decide(self) -> Decided:
        """The Plan for the options' budget.

        Raises:
            BudgetError: nothing found fits.
        """
        for variant in sorted(self.variants, key=lambda v: v.outlook):
            if (decided := variant.decide()) is not None:
                return self._complete(decided)
        raise self.refusal()

    @no_collections()
    def smallest(self) -> Decided:
        """The Plan with the smallest peak, for reports on budgets that nothing fits."""
        found = [variant.smallest() for variant in self.variants]
        return min(found, key=lambda decided: decided.plan.minimum_budget)

    def replay(self, plan: Plan) -> Decided:
        """Carries out the decisions of a given Plan, without a solver.

        Raises:
            PlanError: the Plan belongs to another graph.
        """
        return self._variant(plan).replay(plan)

    def observing(self, *, outputs_held: bool) -> Planner:
        """The same planner for a caller who holds the outputs during the backward, or does not."""
        other = copy.copy(self)
        other.variants = tuple(v.observing(outputs_held=outputs_held) for v in self.variants)
        return other

    def within(self, budget: int | None) -> Planner:
        """The same planner with another budget."""
        other = copy.copy(self)
        other.variants = tuple(v.within(budget) for v in self.variants)
        return other

    def restate(self, decided: Decided, apart: frozenset[str] = frozenset()) -> Decided:
        """What another planner's decisions come to under this one's assumptions.

        Args:
            apart: "forward", "backward": which run operator by operator, generated code or not.
        """
        return self._complete(self._variant(decided.plan).restate(decided, apart))

    def peak_of_graphs(self, decided: Decided) -> int:
        """Peak of forward and backward without the optimizer's state, in bytes."""
        planner = self._variant(decided.plan)
        around = planner.surroundings(decided.plan.decisions)
        return simulate(decided.emitted.split, around).peak_bytes - around.optimizer_bytes

    def rehearse(self, decided: Decided, forward: BoxedFunction, backward: BoxedFunction) -> Peaks:
        """The peaks of functions that run the graphs of ``decided``."""
        return self._variant(decided.plan).rehearse(decided, forward, backward)

    def passes(self, plan: Plan) -> tuple[Pass, ...]:
        """Those that make the graphs that carry out a Plan, in their order."""
        return self._variant(plan).passes

    def partway(self, plan: Plan, count: int) -> TrainGraph:
        """The captured graph after the first ``count`` of ``passes(plan)``, all of it one graph."""
        return self._variant(plan).partway(plan, count)

    def _variant(self, plan: Plan) -> GraphPlanner:
        """Whose graph the plan belongs to."""
        for variant in self.variants:
            if plan.graph_digest == variant.digest:
                return variant
        ours, theirs = self.variants[0].options.inner, plan.request.inner
        made_for = f"{plan.model.name} with inputs {', '.join(plan.model.inputs)}"
        differs = "" if ours == theirs else f', for inner="{theirs}" where this is "{ours}"'
        raise PlanError(
            f"the plan belongs to graph {plan.graph_digest}, this model traces to "
            f"{self.variants[0].digest}\n  it was made for {made_for}{differs}\n"
            "  plan again for this model, these inputs and this version of torch"
        )

    def _complete(self, decided: Decided) -> Decided:
        """With the smallest budget of all variants."""
        others = [v.minimum_budget(decided) for v in self.variants]
        plan = replace(decided.plan, minimum_budget=min(decided.plan.minimum_budget, *others))
        return replace(decided, plan=plan)

    def refusal(self, required: int | None = None) -> BudgetError:
        """The error of a budget that nothing fits.

        Args:
            required: the smallest budget that would do; None: that of operators run one by one.
        """
        planner = self.variants[0]
        budget = planner.options.memory_budget
        assert budget is not None
        smallest = self.smallest()
        plan, timeline = smallest.plan, smallest.emitted.timeline
        required = plan.minimum_budget if required is None else required
        alternatives = [(f'memory_budget="{_round_up(required)}"', required)]
        saved = planner.optimizer_of(plan.decisions).state_bytes
        fixed = dict(timeline.fixed)
        gradients = fixed.pop("gradient", 0) + timeline.gradient_bytes
        freed = planner.states.possible.freed
        if freed > 0 and not planner.options.offload and required - freed <= budget:
            alternatives.append(("offload=True", required - freed))
        if saved and required - saved <= budget:
            alternatives.append(('optimizer="sgd"', required - saved))
        return BudgetError(
            budget_bytes=budget,
            required_bytes=required,
            fixed={**fixed, "gradients": gradients},
            alternatives=alternatives,
        )


def _merged_share(before: TrainGraph, after: TrainGraph) -> float:
    """Bytes of the largest value that preparation merged, by all that the forward makes."""
    storages = analyse(before.graph.nodes)
    kept = {node.name for node in after.graph.nodes}
    made = [
        (sum(storages.bytes[s] for s in storages.of[node]), node.name in kept)
        for node in before.graph.nodes
        if node.op == "call_function"
        and not before.is_backward(node)
        and not storages.is_view(node)
    ]
    largest = max((size for size, stays in made if not stays), default=0)
    return largest / max(sum(size for size, _ in made), 1)


def _round_up(size: int) -> str:
    """A budget one can write that is no smaller than ``size``."""
    mebibytes = size / 2**20
    return f"{-(-size // 2**20)}MiB" if mebibytes >= 100 else f"{-(-size // 2**10)}KiB"
