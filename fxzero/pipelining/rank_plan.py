"""What one rank of a pipeline keeps, recomputes and needs, under its own byte budget.

Every stage has a plan of its own for one micro-batch.  What the rank needs with all that is in
flight is found by a rehearsal.  If it exceeds the budget, all stages give up memory by the same
share of what each can give up, the least that makes the rank fit:

    share 0    every stage as if it were free       peak 900 MiB
    share 1    every stage at its smallest          peak 400 MiB
    budget 600 MiB    ->    share 0.63
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from fxzero.errors import BudgetError
from fxzero.pipelining.rehearsal import Part, rehearse_rank
from fxzero.pipelining.schedules import Schedule
from fxzero.pipelining.stages import Routes, shared_weights
from fxzero.plans import Plan, Value
from fxzero.training_step import TrainingStep
from fxzero.units import format_bytes

_ROUNDS = 6
# The loss of a micro-batch and its gradient.
_SCALARS = 16

# (stage, the budget of one micro-batch) -> what runs it
MakeStep = Callable[[int, int | None], TrainingStep]


@dataclass(frozen=True)
class RankPlan:
    """How a rank trains its stages.

    Attributes:
        steps: for each stage what runs a micro-batch that adds to gradients.
        plan: that of the stage with the most bytes, with what the whole rank needs; None if nothing
            is trained here.
    """

    steps: Mapping[int, TrainingStep]
    plan: Plan | None


def plan_rank(
    make: MakeStep,
    schedule: Schedule,
    rank: int,
    routes: Routes,
    stages: Collection[int],
    batch_bytes: int,
    budget: int | None,
) -> RankPlan:
    """The fastest way found that fits the budget.

    Args:
        stages: those of the rank that are trained.
        batch_bytes: of the batch, which every rank holds, and of frozen stages' weights.

    Raises:
        BudgetError: nothing found fits.
    """
    if not stages:
        return RankPlan({}, None)
    free = {stage: make(stage, None) for stage in stages}
    most = _peak(free, schedule, rank, routes, batch_bytes)
    if budget is None or most <= budget:
        return RankPlan(free, _stated(free, schedule, rank, most, budget))
    spans = {
        stage: (step.plan.minimum_budget, step.plan.peak_bytes) for stage, step in free.items()
    }

    def tightened(share: float) -> tuple[dict[int, TrainingStep], int]:
        budgets = {s: most - int(share * (most - least)) for s, (least, most) in spans.items()}
        steps = {stage: make(stage, budgets[stage]) for stage in stages}
        return steps, _peak(steps, schedule, rank, routes, batch_bytes)

    best, peak = tightened(1.0)
    if peak > budget:
        raise BudgetError(
            budget_bytes=budget,
            required_bytes=peak,
            fixed={"weights, gradients, states": _static_bytes(best), "batch": batch_bytes},
            alternatives=[(f'memory_budget="{-(-peak // 2**10)}KiB"', peak)],
        )
    low, high = 0.0, 1.0
    for _ in range(_ROUNDS):
        share = (low + high) / 2
        steps, reached = tightened(share)
        if reached <= budget:
            best, peak, high = steps, reached, share
        else:
            low = share
    return RankPlan(best, _stated(best, schedule, rank, peak, budget))


def _peak(
    steps: Mapping[int, TrainingStep],
    schedule: Schedule,
    rank: int,
    routes: Routes,
    batch_bytes: int,
) -> int:
    """Most bytes of the rank, the optimizer's step included."""
    parts = {stage: Part(step.emitted.split, step.executable) for stage, step in steps.items()}
    static = _static_bytes(steps) + _shared_bytes(steps, schedule, routes)
    held = static + batch_bytes + _arriving_bytes(schedule, rank, routes)
    held += _SCALARS * schedule.microbatches
    peak = rehearse_rank(schedule, rank, routes, parts, held)
    # Beyond what is there throughout, an optimizer needs memory for what it computes.
    beyond = [
        phase.peak_bytes - sum(step.emitted.timeline.fixed.values())
        for step in steps.values()
        for phase in step.plan.phases
        if phase.name == "optimizer step"
    ]
    return max(peak, static + batch_bytes + max(beyond, default=0))


def _static_bytes(steps: Mapping[int, TrainingStep]) -> int:
    """Weights, buffers, gradients and optimizer states; weights that stages share count once."""
    found: dict[tuple[str, str], int] = {}
    states = 0
    for step in steps.values():
        split = step.emitted.split
        states += step.emitted.timeline.fixed.get("optimizer", 0)
        nodes = split.forward.graph.find_nodes(op="placeholder")
        for role, node in zip(split.inputs, nodes, strict=True):
            if role.kind != "input":
                found[role.kind, role.name] = node.meta["val"].untyped_storage().nbytes()
        _, existing, _ = split.backward_inputs()
        for position, node in zip(split.accumulated, existing, strict=True):
            name = split.inputs[position].name
            found["gradient", name] = node.meta["val"].untyped_storage().nbytes()
    return sum(found.values()) + states


def _shared_bytes(steps: Mapping[int, TrainingStep], schedule: Schedule, routes: Routes) -> int:
    """Earlier gradients of weights that other ranks have too, which wait until new ones are added.

    What all of them found in this step is added up before it is added to what was there.
    """
    sizes = {
        step.emitted.split.inputs[position].name: node.meta["val"].untyped_storage().nbytes()
        for step in steps.values()
        for position, node in zip(
            step.emitted.split.accumulated, step.emitted.split.backward_inputs()[1], strict=True
        )
    }
    shared = shared_weights(routes, schedule)
    return sum(size for name, size in sizes.items() if name in shared)


def _arriving_bytes(schedule: Schedule, rank: int, routes: Routes) -> int:
    """The largest message of each other rank, which may be there before it is asked for."""
    largest: dict[int, int] = {}
    for value in routes.passed.values():
        source = schedule.placement[value.stage]
        for reader in value.readers:
            target = schedule.placement[reader]
            if source != target:
                if target == rank:
                    largest[source] = max(largest.get(source, 0), value.bytes)
                if source == rank and value.trains:
                    largest[target] = max(largest.get(target, 0), value.bytes)
    return sum(largest.values())


def _stated(
    steps: Mapping[int, TrainingStep],
    schedule: Schedule,
    rank: int,
    peak: int,
    budget: int | None,
) -> Plan:
    """The plan of the largest stage as that of the rank."""
    plan = max((step.plan for step in steps.values()), key=lambda plan: plan.peak_bytes)
    stages = ", ".join(map(str, steps))
    note = (
        f"rank {rank} of a pipeline ({schedule.name}, {schedule.stages} stages, "
        f"{schedule.microbatches} micro-batches) trains stage {stages}; by rehearsal it "
        f"needs {format_bytes(peak)}; values are listed for one micro-batch of one stage"
    )
    rest = peak - plan.peak.bytes
    alive = list(plan.peak.alive)
    if rest > 0:
        alive.append(Value("the pipeline", rest, "", "", "", "saved", "in flight, or other stages"))
    else:
        alive = [Value("the rank", peak, "", "", "", "temporary", "by rehearsal")]
    stated = replace(plan.peak, bytes=peak, alive=tuple(sorted(alive, key=lambda v: -v.bytes)))
    return replace(
        plan,
        peak_bytes=peak,
        peak=stated,
        minimum_budget=min(peak, budget or peak),
        request=replace(plan.request, memory_budget=budget),
        ranks=tuple(
            replace(each, peak_bytes=peak, breakdown=stated.breakdown) for each in plan.ranks
        ),
        notes=(*plan.notes, note),
    )
