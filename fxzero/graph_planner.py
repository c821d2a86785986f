"""Plans one graph: from what some passes prepare to decisions, the two graphs, and a Plan of them.

    joint graph -> problem -> solver -> decisions -> passes -> two graphs -> timeline -> Plan

The solver proposes and the timeline disposes: the peak in the Plan is that of the emitted
graphs, and if it exceeds the budget the solver is asked again with less.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fxzero.clock import exposed_share
from fxzero.collectives import is_collective, is_gather
from fxzero.cost import CostModel, bucket_bytes
from fxzero.errors import PlanError, UsageError
from fxzero.execution import BoxedFunction
from fxzero.graph import InputRole, TrainGraph
from fxzero.optimizers import OptimizerProfile, hostable_bytes, profile_optimizer
from fxzero.options import Options, device_of
from fxzero.passes.context import PassContext
from fxzero.passes.partition import Split, partition
from fxzero.passes.pipeline import Pass, select, skipped_passes
from fxzero.passes.runner import checking, run_passes
from fxzero.passes.shard import WHOLE, left_whole
from fxzero.passes.spec import check_split
from fxzero.plans import Decisions, Fetch, Plan, Rematerialization
from fxzero.policies import settled_nodes, unmet_wishes
from fxzero.rehearsal import UNKNOWN, Peaks, rehearse
from fxzero.solver.problem import build_problem
from fxzero.solver.schedule import Schedule
from fxzero.solver.search import Solution, Solver
from fxzero.state_offload import HostStates, Proposal, StateOffload
from fxzero.summary import Facts, summarise
from fxzero.timeline import (
    CUDA_GRANULARITY,
    LOSS_SCALARS,
    Surroundings,
    Timeline,
    simulate,
    tensor_bytes,
)

log = logging.getLogger(__name__)

_TIGHTENINGS = 4
# Share of the step that recompute may cost without a budget, where generated code makes up for it.
_FREE = 0.01
# Share of the parameters in one bucket of stage 3, or on named hardware, unless a budget has less
# room; those in flight come on top.
_PART_GATHERED = 1 / 8
# How many gathers, and how many reductions, run beside operators.
_IN_FLIGHT = 2
# Passes that decide what becomes of gradients: a graph is the same one whatever does.
_OF_GRADIENTS = ("accumulate", "update")
_NO_STATES = HostStates()


@dataclass(frozen=True)
class Emitted:
    """Graphs that carry out decisions, their timeline, and what their operators need meanwhile."""

    split: Split
    timeline: Timeline
    passes: tuple[str, ...]
    workspaces: Mapping[str, int]


@dataclass(frozen=True)
class Decided:
    """A Plan and the graphs that carry it out.

    Attributes:
        apart: "forward", "backward": which run operator by operator though code was asked for.
    """

    plan: Plan
    emitted: Emitted
    apart: frozenset[str] = frozenset()


class GraphPlanner:
    """Plans a captured graph as some passes prepare it.

    Args:
        preparation: passes that run before the plan is made.
        costs: prices of operators on the graph's device.
        outputs_held: whether the caller keeps the model's outputs during the backward.
        writes_buffers: whether the graph updates buffers itself, or returns their new values.
        reduces: whether it averages gradients over the ranks.
        accumulates: whether it adds them to gradients that exist.
        is_stage: whether it is a stage of a pipeline, whose outputs are sent away, which no loss
            outside follows, and which runs for several micro-batches in a step.
        unapplied: what the caller could not apply; more is found here, and all of it is an error
            under ``strict`` and a note in the Plan otherwise.
        sweep: number of points between the ends of the Plan's curve.
    """

    def __init__(
        self,
        graph: TrainGraph,
        options: Options,
        name: str,
        preparation: tuple[Pass, ...],
        costs: CostModel,
        *,
        outputs_held: bool = True,
        writes_buffers: bool = True,
        reduces: bool = True,
        accumulates: bool = False,
        is_stage: bool = False,
        unapplied: tuple[str, ...] = (),
        sweep: int = 0,
    ) -> None:
        self.device = (
            device_of([node.meta["val"] for node in graph.placeholders])
            if options.hardware is None
            else options.hardware.device
        )
        self.context = PassContext(
            device=self.device,
            writes_buffers=writes_buffers,
            sharding=options.sharding,
            reduces=reduces,
            accumulates=accumulates,
            gathers=not (is_stage and options.sharding.gathers_once),
            updates=options.updates,
        )
        chosen = select(skipped_passes(), preparation)
        plain = tuple(itertools.takewhile(lambda item: item.name not in _OF_GRADIENTS, chosen))
        changes_gradients = accumulates or options.updates
        self.graph, reports = run_passes(
            graph, self.context, plain if changes_gradients else chosen
        )
        self.digest = self.graph.digest()
        if changes_gradients:
            self.graph, last = run_passes(self.graph, self.context, chosen[len(plain) :])
            reports += last
        arguments = [(role, node.meta["val"]) for role, node in self.graph.pairs()]
        self.prepared = tuple(report.name for report in reports)
        self.captured = graph
        self.passes = (*chosen, *select(skipped_passes(), options.passes.execution))
        self.options = options
        self.name = name
        self.outputs_held = outputs_held and not is_stage
        self.is_stage = is_stage
        self.sweep = sweep
        skipped = skipped_passes()
        self.offload = options.offload and "offload" not in skipped
        trainable = {role.name: value for role, value in arguments if role in graph.trainable}
        self.states = self._state_offload(trainable)
        self.optimizer = self.states.profile(())
        self.granularity = CUDA_GRANULARITY if self.device == "cuda" else 1
        held = [value for role, value in arguments if role.kind != "tangent"]
        held += [node.meta["val"] for node in self.graph.graph.find_nodes(op="get_attr")]
        self.loss_bytes = 0 if is_stage else _outside_loss_bytes(arguments)
        self.fixed_bytes = self.optimizer.state_bytes + tensor_bytes(held, self.granularity)
        self.fixed_bytes += LOSS_SCALARS if self.loss_bytes else 0
        self.costs = replace(costs, exposed=exposed_share(self.graph, costs))
        self.settled = settled_nodes(self.graph, options.recompute, options.sharding.zero)
        self.recompute = "none" if "rematerialize" in skipped else options.recompute
        self.unapplied = (
            *unapplied,
            *unmet_wishes(self.graph, self.settled),
            *left_whole(self.graph, options.sharding),
            *(f"pass {name} is switched off by FXZERO_SKIP" for name in skipped),
        )
        if self.unapplied and options.strict:
            raise UsageError("strict=True, but\n  " + "\n  ".join(self.unapplied))

    @cached_property
    def solver(self) -> Solver:
        problem = build_problem(
            self.graph,
            costs=self.costs,
            device=self.device,
            fixed_bytes=self.fixed_bytes,
            outputs_held=self.outputs_held,
            loss_bytes=self.loss_bytes,
            granularity=self.granularity,
            policy=self.settled,
            recompute=self.recompute != "none",
            offload=self.offload,
            update_bytes=self.states.most_transient,
        )
        return Solver(problem, objective=self.options.objective)

    def _state_offload(self, trainable: Mapping[str, torch.Tensor]) -> StateOffload:
        """What of the optimizer's state may leave the device: nothing of a stage's."""
        options, parameters = self.options, list(trainable.values())

        def profile(hosted: frozenset[int]) -> OptimizerProfile:
            shards = options.sharding.shards
            return profile_optimizer(options.optimizer, parameters, self.device, shards, hosted)

        sizes = hostable_bytes(options.optimizer, parameters)
        named = dict(zip(trainable, sizes, strict=True))
        allowed = self.offload and options.offload_states and not self.is_stage
        return StateOffload(named, allowed, profile, self._copy_seconds)

    def _copy_seconds(self, size: int) -> float:
        return self.costs.round_trip(torch.empty(size, dtype=torch.uint8, device="meta"))

    @cached_property
    def proposed(self) -> Proposal | None:
        """What the solver answers to the options' budget."""
        return self._propose(self.options.memory_budget)

    @property
    def outlook(self) -> tuple[float, float]:
        """The price and the peak to expect of ``decide``; infinite where nothing fits."""
        if self.proposed is None:
            return float("inf"), float("inf")
        schedule, states = self.proposed.solution.schedule, self.proposed.states
        peak = schedule.peak - states.freed
        if self.options.objective == "flops":
            return schedule.flops, peak
        # Not the recompute alone: merged operations run less often in the forward.
        return self.solver.problem.seconds + schedule.seconds + states.seconds, peak

    def decide(self) -> Decided | None:
        """The Plan for the options' budget; None if nothing found fits."""
        budget = target = self.options.memory_budget
        proposal, least = self.proposed, 0
        for _ in range(_TIGHTENINGS):
            if proposal is None:
                break
            decided = self._emit_within(proposal, budget)
            if budget is None or target is None or decided.plan.peak_bytes <= budget:
                return decided
            excess = _optimizer_step(decided.plan) - budget
            if excess > 0 and self.states.all.freed:  # where recompute helps nothing
                least = max(least, proposal.states.freed) + excess
            else:
                target -= decided.plan.peak_bytes - budget
            proposal = self._propose(target, least)
        # The smallest is what a refusal would name.
        smallest = self.solver.smallest.peak - self.states.all.freed
        if budget is not None and smallest <= budget and not self._keeps_all:
            solution = Solution(self.solver.smallest, "feasible", None)
            decided = self._emit(Proposal(solution, self.states.all))
            return decided if decided.plan.peak_bytes <= budget else None
        return None

    def _emit_within(self, proposal: Proposal, budget: int | None) -> Decided:
        """With the fastest way to run collectives that the budget has room for."""
        schedule = proposal.solution.schedule
        for bucket, in_flight in self._ways_to_communicate:
            decisions = self._decisions(schedule, bucket, in_flight, proposal.states)
            emitted = self._carry_out(decisions)
            if budget is None or emitted.timeline.peak_bytes <= budget:
                break
        return self._summarised(proposal.solution, decisions, emitted)

    @cached_property
    def _ways_to_communicate(self) -> tuple[tuple[int, int], ...]:
        """Up to how many bytes to merge collectives, and how many of them run beside operators.

        Fastest first: both take memory.
        """
        nodes = list(self.graph.graph.nodes)
        if not any(map(is_collective, nodes)):
            return ((0, 0),)
        axes = self.options.sharding.axes
        largest = max((bucket_bytes(self.costs.route(axis.name)) for axis in axes), default=0)
        if self.options.sharding.zero == 3:
            # Nobody asks for it to have most of the model there at once.
            whole = tensor_bytes(node.meta["val"] for node in nodes if is_gather(node))
            largest = min(largest, int(_PART_GATHERED * whole))
        elif self.options.hardware is not None:
            # Where hundreds of hops make latencies long, one message for all would hide nothing.
            weights = [n for role, n in self.graph.pairs() if role.kind == "parameter"]
            whole = tensor_bytes(node.meta.get(WHOLE, node.meta["val"]) for node in weights)
            largest = min(largest, int(_PART_GATHERED * whole))
        small = largest // 8
        return ((largest, _IN_FLIGHT), (small, _IN_FLIGHT), (small, 1), (small, 0), (0, 0))

    def smallest(self) -> Decided:
        """The Plan with the smallest peak."""
        solution = Solution(self._smallest_schedule(), "infeasible", None)
        return self._emit(Proposal(solution, self.states.all))

    def _smallest_schedule(self) -> Schedule:
        """The smallest peak that the ``recompute`` option can reach."""
        return self.solver.everything if self._keeps_all else self.solver.smallest

    @cached_property
    def _keeps_all(self) -> bool:
        """Whether there is nothing to decide."""
        chooses = self.options.sharding.zero is None and any(map(is_gather, self.graph.graph.nodes))
        return self.recompute == "none" and not self.offload and not chooses

    def replay(self, plan: Plan) -> Decided:
        """Carries out a Plan for this graph, made for steps that add to gradients or for others."""
        decided = Decided(plan, self._carry_out(plan.decisions))
        alike = plan.request.accumulate == self.graph.accumulates
        return decided if alike else self.restate(decided)

    def minimum_budget(self, decided: Decided) -> int:
        """The smallest budget of this graph, given any plan for the optimizer step's part."""
        there = self.optimizer_of(decided.plan.decisions)
        gone = self.states.profile(self.states.all.names)
        step = _optimizer_step(decided.plan) + gone.whole_bytes - there.whole_bytes
        return max(self._smallest_schedule().peak - self.states.all.freed, step)

    def observing(self, *, outputs_held: bool) -> GraphPlanner:
        """The same planner for a caller who holds the outputs during the backward, or does not."""
        other = copy.copy(self)
        other.outputs_held = outputs_held
        for derived in ("solver", "proposed", "swept"):
            vars(other).pop(derived, None)
        return other

    def within(self, budget: int | None) -> GraphPlanner:
        """The same planner with another budget."""
        other = copy.copy(self)
        other.options = replace(self.options, memory_budget=budget)
        vars(other).pop("proposed", None)
        return other

    def restate(self, decided: Decided, apart: frozenset[str] = frozenset()) -> Decided:
        """What another planner's decisions come to under this one's assumptions.

        Args:
            apart: "forward", "backward": which run operator by operator, generated code or not.
        """
        emitted = decided.emitted
        around = self.surroundings(decided.plan.decisions)
        emitted = replace(emitted, timeline=simulate(emitted.split, around))
        facts = self._facts(emitted, decided.plan.decisions, apart)
        status, gap = decided.plan.status, decided.plan.gap
        if apart:  # what was proven was so of generated code
            status, gap = "feasible", None
        return Decided(summarise(facts, status=status, gap=gap), emitted, apart)

    def rehearse(self, decided: Decided, forward: BoxedFunction, backward: BoxedFunction) -> Peaks:
        """The peaks of functions that run the graphs of ``decided``."""
        emitted = decided.emitted
        fixed = sum(emitted.timeline.fixed.values())
        around = self.surroundings(decided.plan.decisions)
        try:
            return rehearse(emitted.split, forward, backward, around, fixed)
        except Exception as error:  # generated code may hold anything
            log.warning("generated code cannot be rehearsed: %s: %s", type(error).__name__, error)
            return UNKNOWN

    def _propose(self, budget: int | None, least: int = 0) -> Proposal | None:
        """What is cheapest within a budget, when the step needs ``least`` bytes of state away."""
        if budget is not None and self.states.all.freed:
            return self.states.propose(self.solver, self._solve, budget, least)
        solution = self._solve(budget)
        return None if solution is None else Proposal(solution, _NO_STATES)

    def _solve(self, budget: int | None) -> Solution | None:
        if self._keeps_all:
            schedule = self.solver.everything
        elif self.recompute == "full":
            schedule = self.solver.smallest
        elif budget is None and self.options.inner == "inductor":
            return self.solver.least_peak(_FREE)
        else:
            return self.solver.solve(budget)
        fits = budget is None or schedule.peak <= budget
        return Solution(schedule, "feasible", None) if fits else None

    def _emit(self, proposal: Proposal) -> Decided:
        decisions = self._decisions(proposal.solution.schedule, states=proposal.states)
        return self._summarised(proposal.solution, decisions, self._carry_out(decisions))

    def _summarised(self, solution: Solution, decisions: Decisions, emitted: Emitted) -> Decided:
        facts = self._facts(emitted, decisions)
        return Decided(summarise(facts, status=solution.status, gap=solution.gap), emitted)

    def _decisions(
        self,
        schedule: Schedule,
        bucket: int = 0,
        in_flight: int = 0,
        states: HostStates = _NO_STATES,
    ) -> Decisions:
        problem = self.solver.problem
        makers = {problem.maker[storage] for storage in schedule.saved}
        runs = [(problem.operators[q], problem.steps[step]) for q, step in schedule.recompute]
        return Decisions(
            saved=tuple(problem.operators[index].name for index in sorted(makers)),
            recompute=tuple(Rematerialization(o.name, at) for o, at in runs if not o.fetches),
            offload=tuple(Fetch(o.name, at) for o, at in runs if o.fetches),
            bucket_bytes=bucket,
            in_flight=in_flight,
            host_states=states.names,
        )

    def _carry_out(self, decisions: Decisions) -> Emitted:
        context = replace(self.context, decisions=decisions)
        passes = self.passes[len(self.prepared) :]
        graph, reports = run_passes(self.graph, context, passes)
        split = partition(graph)
        if checking():
            check_split(split)
        timeline = simulate(split, self.surroundings(decisions))
        names = (*self.prepared, *(report.name for report in reports))
        return Emitted(split, timeline, names, self.costs.workspaces)

    def partway(self, plan: Plan, count: int) -> TrainGraph:
        """The graph that carries out a Plan, as the first ``count`` of ``passes`` leave it."""
        context = replace(self.context, decisions=plan.decisions)
        passes = self.passes[:count]
        graph, _ = run_passes(self.captured, context, passes, check=False)
        return graph

    @cached_property
    def swept(self) -> tuple[Schedule, ...]:
        """Schedules for budgets in equal distances from the smallest peak to no recompute."""
        low, high = self.solver.smallest.peak, self.solver.everything.peak
        budgets = [low + (high - low) * i // (self.sweep + 1) for i in range(1, self.sweep + 1)]
        solutions = [self.solver.solve(budget) for budget in budgets]
        return tuple(s.schedule for s in solutions if s is not None)

    def optimizer_of(self, decisions: Decisions) -> OptimizerProfile:
        """The optimizer's memory where some of its state is on the host.

        Raises:
            PlanError: the state of a parameter that this optimizer cannot keep there.
        """
        names = decisions.host_states
        strange = [name for name in names if not self.states.can_leave(name)]
        if strange:
            raise PlanError(
                f"the plan has the optimizer's state of {strange[0]} in host memory, where "
                f"{self.optimizer.name} cannot keep it\n  plan again for this optimizer"
            )
        return self.states.profile(names)

    def surroundings(self, decisions: Decisions) -> Surroundings:
        """What the timeline must know besides the graphs."""
        optimizer = self.optimizer_of(decisions)
        return Surroundings(
            optimizer.state_bytes,
            self.outputs_held,
            self.loss_bytes,
            self.granularity,
            optimizer.transient_bytes,
            self.device,
            self.costs.workspaces,
        )

    def _facts(
        self, emitted: Emitted, decisions: Decisions, apart: frozenset[str] = frozenset()
    ) -> Facts:
        return Facts(
            graph=self.graph,
            digest=self.digest,
            name=self.name,
            options=self.options,
            optimizer=self.optimizer_of(decisions),
            states=self.states,
            device=self.device,
            costs=self.costs,
            decisions=decisions,
            split=emitted.split,
            timeline=emitted.timeline,
            passes=emitted.passes,
            smallest=self._smallest_schedule(),
            everything=self.solver.everything,
            sweep=self.swept,
            outputs_held=self.outputs_held,
            loss_bytes=self.loss_bytes,
            is_stage=self.is_stage,
            unapplied=self.unapplied,
            apart=apart,
        )


def _optimizer_step(plan: Plan) -> int:
    """The peak of the optimizer's step, in bytes."""
    return next(p.peak_bytes for p in plan.phases if p.name == "optimizer step")


def _outside_loss_bytes(arguments: list[tuple[InputRole, torch.Tensor]]) -> int:
    """What a loss outside the model takes at most while it is computed and differentiated.

    For cross entropy that is the log-probabilities and two gradients, each of the outputs' size.
    """
    tangents = [value for role, value in arguments if role.kind == "tangent"]
    if any(value.ndim == 0 for value in tangents):
        return 0
    return 3 * tensor_bytes(tangents)
