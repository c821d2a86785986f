"""What one rank of a pipeline keeps, recomputes and needs, under its own byte budget.

Every stage has a plan of its own for one micro-batch.  What the rank needs with all that is in
flight is found by a rehearsal.  If it exceeds the budget, all stages give up memory by the same
share of what each can give up, the least that makes the rank fit:

    share 0    every stage as if it were free       peak 900 MiB
    share 1    every stage at its smallest          peak 400 MiB
    budget 600 MiB    ->    share 0.6
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from fxzero.errors import BudgetError
from fxzero.graph_planner import Emitted
from fxzero.mesh import Sharding
from fxzero.pipelining.gradients import ENDS, existing, gradients_of, nbytes, over_step
from fxzero.pipelining.rehearsal import Part, Step, rehearse_rank
from fxzero.pipelining.schedules import Action, Kind, Schedule
from fxzero.pipelining.stages import Routes, shared_weights
from fxzero.plans import Phase, Plan, Rank, Value
from fxzero.runtime import Executable
from fxzero.units import format_bytes

# How often to look for a share, and what share of the budget is close enough to it.
_ROUNDS, _CLOSE = 5, 0.98
# Micro-batches more, for messages that nobody is certain to have read.
_ON_THEIR_WAY = 2
_Waiting = tuple[int, Kind]
# A stage, what it does, and the stages that have gradients then.
_Computed = tuple[int, Kind, frozenset[int]]
# The loss of a micro-batch and its gradient.
_SCALARS = 16


class Planned(Protocol):
    """A stage's plan for a micro-batch that is neither the first nor the last of a step."""

    @property
    def plan(self) -> Plan:
        """Of the stage alone."""

    @property
    def emitted(self) -> Emitted:
        """The graphs that carry it out."""

    @property
    def executable(self) -> Executable:
        """The functions that run them."""


Run = TypeVar("Run", bound=Planned)


@dataclass(frozen=True)
class RankPlan(Generic[Run]):
    """How a rank trains its stages.

    Attributes:
        stages: for each stage what plans and runs a micro-batch.
        working_bytes: the most that it holds in forwards and backwards.
        updating_bytes: the most that it holds in the optimizer's step.
        earlier_bytes: what it holds besides, in a step that finds gradients and adds to them.
        static: bytes by role of what is there in all forwards and backwards.
        kept: the same of what is left for the optimizer's step.
        rehearsed: what was rehearsed of its schedule, with what it held.
    """

    stages: Mapping[int, Run]
    working_bytes: int
    updating_bytes: int
    earlier_bytes: int = 0
    static: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    rehearsed: tuple[tuple[Action, Step], ...] = ()

    @property
    def peak_bytes(self) -> int:
        return max(self.working_bytes, self.updating_bytes)


class RankPlanner(Generic[Run]):
    """Plans one rank for any budget.

    Args:
        make: (stage, the budget of one micro-batch) -> what runs it.
        stages: those of the rank that are trained.
        held: bytes of the batch, which every rank holds, and of frozen stages' weights.
        finds_gradients: whether steps find gradients of earlier ones, and add to them.
    """

    def __init__(
        self,
        make: Callable[[int, int | None], Run],
        schedule: Schedule,
        rank: int,
        routes: Routes,
        stages: Collection[int],
        held: int,
        finds_gradients: bool = False,
    ) -> None:
        self.make, self.schedule, self.rank, self.routes = make, schedule, rank, routes
        self.stages, self.held = tuple(stages), held
        self.finds_gradients = finds_gradients

    @cached_property
    def free(self) -> RankPlan[Run]:
        """Every stage as if it had all memory."""
        return self._rehearsed({stage: self.make(stage, None) for stage in self.stages})

    @cached_property
    def smallest(self) -> RankPlan[Run]:
        """Every stage at its smallest peak."""
        return self._tightened(1.0)

    def within(self, budget: int | None) -> RankPlan[Run]:
        """The fastest way found that fits the budget.

        Raises:
            BudgetError: nothing found fits.
        """
        if not self.stages or budget is None or self.free.peak_bytes <= budget:
            return self.free
        best = self.smallest
        if best.peak_bytes > budget:
            raise self._refusal(budget)
        low, high = (0.0, self.free.peak_bytes), (1.0, best.peak_bytes)
        for _ in range(_ROUNDS):
            if best.peak_bytes >= _CLOSE * budget:
                break
            # As if peaks fell evenly between the two.
            step = (low[1] - budget) / (low[1] - high[1])
            share = low[0] + step * (high[0] - low[0])
            found = self._tightened(share)
            if found.peak_bytes <= budget:
                best, high = found, (share, found.peak_bytes)
            else:
                low = share, found.peak_bytes
        return best

    @cached_property
    def _few(self) -> Schedule:
        """What is rehearsed of the schedule."""
        return representative(self.schedule, self.rank)

    def _tightened(self, share: float) -> RankPlan[Run]:
        budgets = {}
        for stage, step in self.free.stages.items():
            most, least = step.plan.peak_bytes, step.plan.minimum_budget
            budgets[stage] = most - int(share * (most - least))
        return self._rehearsed({stage: self.make(stage, size) for stage, size in budgets.items()})

    def _rehearsed(self, stages: Mapping[int, Run]) -> RankPlan[Run]:
        """With the bytes of the whole rank, the optimizer's step included."""
        parts = {
            stage: Part(step.emitted.split, step.executable, step.emitted.workspaces)
            for stage, step in stages.items()
        }
        order = self._few.orders[self.rank]
        sizes = _static_bytes(stages)
        gradients = gradients_of({stage: part.split for stage, part in parts.items()}, order)
        averaged = sum(each.part for each in gradients.values())
        earlier = averaged + _shared_bytes(stages, self.schedule, self.routes)
        kept = {role: size for role, size in sizes.items() if role != "gathered"}
        kept["gradient"] += averaged - sum(each.whole for each in gradients.values())
        if self.finds_gradients:
            sizes["gradient"] += earlier
        inputs = self.held + _SCALARS * self.schedule.microbatches
        held = sum(sizes.values()) + inputs
        device = next(iter(stages.values())).plan.request.device
        played = rehearse_rank(self._few, self.rank, self.routes, parts, held, device)
        steps = over_step(order, played, gradients, finds=self.finds_gradients)
        working = max((step.during for step in steps), default=held)
        # Beyond what is there throughout, an optimizer needs memory for what it computes.
        beyond = [
            phase.peak_bytes - sum(step.emitted.timeline.fixed.values())
            for step in stages.values()
            for phase in step.plan.phases
            if phase.name == "optimizer step"
        ]
        return RankPlan(
            stages,
            working,
            sum(kept.values()) + self.held + max(beyond, default=0),
            0 if self.finds_gradients else earlier,
            {**sizes, "input": inputs},
            {**kept, "input": inputs},
            tuple(zip(order, steps, strict=True)),
        )

    def _refusal(self, budget: int) -> BudgetError:
        peak = self.smallest.peak_bytes
        static = sum(_static_bytes(self.smallest.stages).values())
        return BudgetError(
            budget_bytes=budget,
            required_bytes=peak,
            fixed={"weights, gradients, states": static, "batch": self.held},
            alternatives=[(f'memory_budget="{-(-peak // 2**10)}KiB"', peak)],
        )

    def stated(self, found: RankPlan[Run], budget: int | None) -> Plan:
        """The plan of the stage with the most bytes, with what the whole rank needs."""
        schedule, peak = self.schedule, found.peak_bytes
        plan = max((step.plan for step in found.stages.values()), key=lambda p: p.peak_bytes)
        stages = ", ".join(map(str, found.stages))
        note = (
            f"rank {self.rank} of a pipeline ({schedule.name}, {schedule.stages} stages, "
            f"{schedule.microbatches} micro-batches) trains stage {stages}; by rehearsal it "
            f"needs {format_bytes(peak)}; values are listed for one micro-batch of one stage"
        )
        rest = peak - plan.peak.bytes
        alive = list(plan.peak.alive)
        if rest > 0:
            why = "in flight, or other stages"
            alive.append(Value("the pipeline", rest, "", "", "", "saved", why))
        else:
            alive = [Value("the rank", peak, "", "", "", "temporary", "by rehearsal")]
        alive.sort(key=lambda value: -value.bytes)
        stated = replace(plan.peak, bytes=peak, alive=_undated(alive))
        return replace(
            plan,
            status="feasible" if budget is None or peak <= budget else "infeasible",
            gap=None,
            peak_bytes=peak,
            peak=stated,
            minimum_budget=min(peak, budget or peak),
            request=replace(plan.request, memory_budget=budget),
            ranks=tuple(Rank(rank.index, peak, stated.breakdown) for rank in plan.ranks),
            phases=(
                Phase("forward and backward", found.working_bytes),
                Phase("optimizer step", found.updating_bytes),
            ),
            timeline=(),  # that of one micro-batch would show neither the peak nor the step
            saved=_undated(plan.saved),
            recomputed=_undated(plan.recomputed),
            offloaded=_undated(plan.offloaded),
            notes=(*plan.notes, note, *_note_of_earlier(found)),
            states=None,
        )


def _undated(values: Iterable[Value]) -> tuple[Value, ...]:
    """When values of a micro-batch are there says nothing about the step."""
    return tuple(replace(value, first=-1, last=-1) for value in values)


def representative(schedule: Schedule, rank: int) -> Schedule:
    """The schedule of the first and the last micro-batches, so many that the rank holds as much.

    What it holds depends on how much each of its stages has in flight, and waiting for weight
    gradients, when one of them computes something, and on whose gradients were made: for memory,
    all other micro-batches are alike.
    """
    everything = _situations(schedule.orders[rank])
    for least in range(1, schedule.microbatches // 2 - _ON_THEIR_WAY):
        count = least + _ON_THEIR_WAY
        ends = {*range(count), *range(schedule.microbatches - count, schedule.microbatches)}
        orders = tuple(
            tuple(action for action in order if action.microbatch in ends)
            for order in schedule.orders
        )
        met = _situations(orders[rank])
        if all(
            any(all(waiting[key] <= other[key] for key in waiting) for other in met.get(what, ()))
            for what, each in everything.items()
            for waiting in each
        ):
            return replace(schedule, orders=orders)
    return schedule


def _situations(order: Iterable[Action]) -> dict[_Computed, list[Counter[_Waiting]]]:
    """By what is computed: how many micro-batches of which stage wait for which gradient then."""
    found: dict[_Computed, list[Counter[_Waiting]]] = {}
    made = frozenset[int]()
    for action, waiting in waiting_at(order):
        if action.kind in ENDS:
            made |= {action.stage}
        situations = found.setdefault((action.stage, action.kind, made), [])
        if waiting not in situations:
            situations.append(waiting)
    return found


def waiting_at(order: Iterable[Action]) -> Iterator[tuple[Action, Counter[_Waiting]]]:
    """Each action with how many micro-batches of which stage wait for which gradient then."""
    waiting: Counter[_Waiting] = Counter()
    for action in order:
        yield action, waiting.copy()
        stage, kind = action.stage, action.kind
        if kind is Kind.FORWARD:
            waiting[stage, Kind.INPUT_GRADIENT] += 1
        elif kind is Kind.WEIGHT_GRADIENT:
            waiting[stage, kind] -= 1
        else:
            waiting[stage, Kind.INPUT_GRADIENT] -= 1
            waiting[stage, Kind.WEIGHT_GRADIENT] += kind is Kind.INPUT_GRADIENT


def reduces_usually(sharding: Sharding) -> bool:
    """Whether micro-batches between the first and the last average their gradients over ranks.

    Stages 0 and 1 keep whole gradients, and do so with the last one.
    """
    return sharding.ranks == 1 or sharding.zero not in (0, 1)


def _note_of_earlier(found: RankPlan[Run]) -> Iterator[str]:
    if found.earlier_bytes:
        size = format_bytes(found.earlier_bytes)
        yield f"a step that finds gradients of an earlier one needs up to {size} more"


def _static_bytes(stages: Mapping[int, Planned]) -> dict[str, int]:
    """Weights, buffers, gradients and optimizer states; weights that stages share count once.

    Those that are gathered for a step's micro-batches are gone in the optimizer's step.
    """
    found: dict[tuple[str, str], int] = {}
    sizes = {"optimizer": 0, "gradient": 0}
    for step in stages.values():
        split = step.emitted.split
        sizes["optimizer"] += step.emitted.timeline.fixed.get("optimizer", 0)
        nodes = split.forward.graph.find_nodes(op="placeholder")
        for role, node in zip(split.inputs, nodes, strict=True):
            if role.kind != "input":
                found[role.kind, role.name] = nbytes(node)
        for name, gradient in existing(split):
            found["gradient", name] = nbytes(gradient)
    for (kind, _), size in found.items():
        sizes[kind] = sizes.get(kind, 0) + size
    return sizes


def _shared_bytes(stages: Mapping[int, Planned], schedule: Schedule, routes: Routes) -> int:
    """Earlier gradients of weights that other ranks have too, which wait until new ones are added.

    What all of them found in this step is added up before it is added to what was there.
    """
    gradients = dict(item for step in stages.values() for item in existing(step.emitted.split))
    shared = shared_weights(routes, schedule)
    return sum(nbytes(gradient) for name, gradient in gradients.items() if name in shared)
