"""Plans all ranks of a pipeline in one process, where none of them has to run.

Stages are traced and planned as their ranks would do it, and each rank is rehearsed.  What stages
then take, with their recompute and collectives, is simulated once more: that is the step's time.

    cuts -> stages -> a plan for each -> ranks' peaks
                            |
                            +-> stage times -> schedule -> seconds, bubble
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx, nn

from fxzero.calibration import cost_model
from fxzero.clock import elapsed
from fxzero.errors import BudgetError
from fxzero.graph import describe
from fxzero.graph_planner import Emitted
from fxzero.inner import executable, generate
from fxzero.mesh import Mesh
from fxzero.microbatches import Batch
from fxzero.network import Route
from fxzero.options import Options, model_device
from fxzero.passes.split_backward import split_backward
from fxzero.pipelining.frozen import FrozenStage
from fxzero.pipelining.outline import outline
from fxzero.pipelining.planning import Choice, Chooser
from fxzero.pipelining.rank_plan import RankPlan, RankPlanner, reduces_usually
from fxzero.pipelining.request import Pipeline
from fxzero.pipelining.schedules import Schedule, StageTimes
from fxzero.pipelining.stages import Exports, Loss
from fxzero.pipelining.tracks import rank_track
from fxzero.planner import Planner
from fxzero.plans import CurvePoint, ModelSummary, Plan, Rank
from fxzero.randomness import RandomState
from fxzero.receiving import Updates
from fxzero.rehearsal import UNKNOWN
from fxzero.runtime import Executable
from fxzero.timeline import tensor_bytes


@dataclass(frozen=True)
class StageForecast:
    """A stage's plan for one micro-batch, and functions to rehearse it with."""

    plan: Plan
    emitted: Emitted
    executable: Executable


_Ranks = Mapping[int, RankPlan[StageForecast]]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Setting:
    """A way to run a pipeline.

    Attributes:
        request: with the schedule.
        batch: of one pipeline.
        mesh: whose "pp" the stages lie along.
        options: for that mesh.
    """

    request: Pipeline
    batch: Batch
    microbatches: int
    mesh: Mesh
    options: Options

    @property
    def ranks(self) -> int:
        """Of one pipeline."""
        return self.mesh.sizes.get("pp", 1)


class Forecaster:
    """Plans pipelines of a model.

    Args:
        loss: from what the model returns to the scalar that is trained.
    """

    def __init__(self, model: nn.Module, loss: Loss, options: Options, name: str) -> None:
        self.model, self.loss, self.name = model, loss, name
        self.options = options
        self.costs = cost_model(
            model_device(model),
            fused=options.inner == "inductor",
            hardware=options.hardware,
            mesh=options.ranks,
        )
        self._choosers: dict[int, Chooser] = {}

    def chooser(self, setting: Setting) -> Chooser:
        """Chooses cuts for micro-batches of a size."""
        size = setting.batch.size // setting.microbatches
        if size not in self._choosers:
            args, kwargs = next(setting.batch.cut(setting.microbatches))
            exports = Exports(
                self.model, args, kwargs, loss=self.loss, precision=self.options.precision
            )
            self._choosers[size] = Chooser(exports, self.options, self.costs)
        return self._choosers[size].under(setting.options)

    def promised(self, setting: Setting) -> float:
        """The modelled seconds of a step."""
        choice = next(_choices(self.chooser(setting), setting))
        return choice.simulated(_scheduled(choice, setting)).step_seconds

    def plan(self, setting: Setting) -> Plan:
        """The plan of all ranks.

        Its status is "infeasible", and it is that of the smallest peak, where nothing fits.
        """
        plans = []
        for choice in _choices(chooser := self.chooser(setting), setting):
            plans.append(_Forecast(chooser, setting, choice, self.name).plan)
            if plans[-1].fits:
                break
        return min(plans, key=lambda plan: (not plan.fits, plan.minimum_budget))


def fitting_choice(chooser: Chooser, setting: Setting) -> Choice:
    """Where to cut the model: the first choice whose ranks all fit, or the last one."""
    for choice in _choices(chooser, setting):
        if setting.options.memory_budget is None:
            break
        if _Forecast(chooser, setting, choice, chooser.exports.name).fits:
            break
    return choice


def _choices(chooser: Chooser, setting: Setting) -> Iterator[Choice]:
    request, ranks = setting.request, setting.ranks
    return chooser.choices(
        request.schedule,
        ranks,
        request.stages_on(ranks),
        setting.microbatches,
        modules=request.cuts,
        held=tensor_bytes(setting.batch.leaves),
    )


def _scheduled(choice: Choice, setting: Setting) -> Schedule:
    return choice.schedule(setting.request.schedule, setting.ranks, setting.microbatches)


class _Forecast:
    """The plan of one choice of cuts."""

    def __init__(self, chooser: Chooser, setting: Setting, choice: Choice, name: str) -> None:
        self.setting, self.choice, self.name = setting, choice, name
        self.costs, self.options = chooser.costs, setting.options
        self.stages = chooser.exports.cut(choice.cuts)
        self.schedule = _scheduled(choice, setting)
        self._planners: dict[int, tuple[Planner, tuple[int, ...]]] = {}

    @property
    def fits(self) -> bool:
        """Whether all ranks keep to the budget."""
        budget = self.options.memory_budget
        try:
            for planner in self._ranks.values():
                planner.within(budget)
        except BudgetError:
            return False
        return True

    @cached_property
    def plan(self) -> Plan:
        """With the peak of the rank that needs most, and the work of the one that has most."""
        budget, planners = self.options.memory_budget, self._ranks
        found = {rank: _within_or_smallest(each, budget) for rank, each in planners.items()}
        stated = {rank: each.stated(found[rank], budget) for rank, each in planners.items()}
        choice, schedule = self._priced(found)
        played = choice.simulated(schedule)
        smallest = self._point({rank: each.smallest for rank, each in planners.items()})
        free = self._point({rank: each.free for rank, each in planners.items()})
        worst = max(stated.values(), key=lambda plan: plan.peak_bytes)
        seconds = played.step_seconds + self._around(choice)
        return replace(
            worst,
            model=self._summary,
            minimum_budget=smallest.peak_bytes,
            unplanned_peak_bytes=free.peak_bytes,
            step_seconds=seconds,
            recompute_seconds=self._most(found, lambda plan: plan.recompute_seconds),
            recompute_flops=self._most(found, lambda plan: plan.recompute_flops),
            transfer_seconds=self._most(found, lambda plan: plan.transfer_seconds),
            communication_seconds=self._most(found, lambda plan: plan.communication_seconds),
            exposed_seconds=self._most(found, lambda plan: plan.exposed_seconds),
            request=replace(worst.request, mesh=dict(self.setting.mesh.sizes)),
            ranks=self._every_rank(stated),
            phases=tuple(
                replace(phase, start=seconds if phase.name == "optimizer step" else 0.0)
                for phase in worst.phases
            ),
            timeline=tuple(
                rank_track(rank, each, schedule, played, seconds) for rank, each in found.items()
            ),
            alternatives=(),
            curve=(smallest, free) if free.peak_bytes > smallest.peak_bytes else (free,),
            graph_digest=self.stages.exports.digest,
            pipeline=outline(choice, schedule, played, self.stages.routes),
        )

    def _most(self, ranks: _Ranks, of: Callable[[Plan], Number]) -> Number:
        """What the stages of the rank that has most of it come to in a step."""
        totals = [sum(of(stage.plan) for stage in rank.stages.values()) for rank in ranks.values()]
        return self.schedule.microbatches * max(totals)

    def _point(self, ranks: _Ranks) -> CurvePoint:
        """A way to plan the ranks: its peak and what its step costs."""
        choice, schedule = self._priced(ranks)
        return CurvePoint(
            max(rank.peak_bytes for rank in ranks.values()),
            choice.simulated(schedule).step_seconds + self._around(choice),
            self._most(ranks, lambda plan: plan.recompute_seconds),
            self._most(ranks, lambda plan: plan.recompute_flops),
        )

    @cached_property
    def _ranks(self) -> dict[int, RankPlanner[StageForecast]]:
        """Planners of the ranks that train anything."""
        schedule, planners = self.schedule, {}
        for rank in range(schedule.ranks):
            mine = schedule.stages_of(rank)
            trained = [stage for stage in mine if self.stages.trains(stage)]
            frozen = [s for s in mine if s not in trained]
            held = tensor_bytes(self.setting.batch.leaves)
            held += sum(FrozenStage(self.stages.parts[stage]).bytes for stage in frozen)
            if trained:
                planners[rank] = RankPlanner(
                    self._make, schedule, rank, self.stages.routes, trained, held
                )
        return planners

    def _make(self, stage: int, budget: int | None) -> StageForecast:
        if stage not in self._planners:
            captured = self.stages.capture(stage, self.options.inner)
            planner = Planner(
                captured.graph,
                replace(self.options, memory_budget=None),
                self.name,
                reduces=reduces_usually(self.options.sharding),
                accumulates=True,
                is_stage=True,
            )
            self._planners[stage] = planner, captured.attached
        planner, attached = self._planners[stage]
        decided = planner.within(budget).decide()
        split = decided.emitted.split
        code = generate(
            split,
            "eager",
            limit=None,
            rehearse=lambda forward, backward: UNKNOWN,
            in_halves=self.schedule.splits_backward,
        )
        runs = executable(split, code, "eager", attached=attached, owner=_Nobody())
        return StageForecast(decided.plan, decided.emitted, runs)

    def _priced(self, ranks: _Ranks) -> tuple[Choice, Schedule]:
        """The choice with the times of what was planned, and its schedule."""
        times = list(self.choice.times)
        for rank in ranks.values():
            for stage, found in rank.stages.items():
                times[stage] = self._times(found.emitted, times[stage])
        choice = replace(self.choice, times=tuple(times))
        return choice, _scheduled(choice, self.setting)

    def _times(self, emitted: Emitted, known: StageTimes) -> StageTimes:
        """What a stage's graphs take."""

        def seconds(graph: fx.Graph) -> float:
            return elapsed([graph], self.costs.price, self.costs.overlap).step

        split = emitted.split
        forward, backward = seconds(split.forward.graph), seconds(split.backward.graph)
        if not self.schedule.splits_backward:
            late = min(known.weight_gradient, backward)
            return StageTimes(forward, backward - late, late)
        parts = split_backward(split.backward, split.input_gradients)
        return StageTimes(
            forward, seconds(parts.input_part.graph), seconds(parts.weight_part.graph)
        )

    def _around(self, choice: Choice) -> float:
        """Seconds of collectives before the first micro-batch and behind the last.

        Weights that are gathered once, and gradients that are averaged at last, are moved one by
        one.  The last backward hides some of that.
        """
        sharding = self.options.sharding
        routes = [self.costs.route(axis.name) for axis in sharding.axes]

        def all_of(seconds: Callable[[Route, int], float]) -> float:
            """Of the rank that takes longest."""
            mine = map(self.schedule.stages_of, range(self.schedule.ranks))
            return max(
                sum(seconds(along, size) for along in routes for size in self._weights(stages))
                for stages in mine
            )

        once = all_of(lambda along, size: along.gather(size))
        seconds = once if sharding.gathers_once else 0.0
        if not reduces_usually(sharding):
            hidden = max(times.input_gradient + times.weight_gradient for times in choice.times)
            if sharding.zero == 0:
                once = all_of(lambda along, size: along.all_reduce(size))
            seconds += max(once - hidden, 0.0)
        return seconds

    def _weights(self, stages: Collection[int]) -> list[int]:
        """The bytes of each parameter that some stages read."""
        owners = self.stages.routes.owners
        named = self.stages.exports.exported.forward.named_parameters()
        return [
            tensor_bytes([parameter])
            for name, parameter in named
            if {*owners.get(name.removeprefix("model."), ())} & {*stages}
        ]

    @cached_property
    def _summary(self) -> ModelSummary:
        forward = self.stages.exports.exported.forward
        names = self.stages.routes.owners
        parameters = [
            tensor
            for name, tensor in forward.named_parameters()
            if name.removeprefix("model.") in names
        ]
        leaves = self.stages.exports.exported.leaves
        return ModelSummary(
            name=self.name,
            parameters=sum(p.numel() for p in parameters),
            parameter_bytes=tensor_bytes(parameters),
            trainable_bytes=tensor_bytes(p for p in parameters if p.requires_grad),
            buffer_bytes=tensor_bytes(
                b for n, b in forward.named_buffers() if n.removeprefix("model.") in names
            ),
            inputs=tuple(map(describe, leaves)),
            nodes=len(forward.graph.nodes),
        )

    def _every_rank(self, plans: dict[int, Plan]) -> tuple[Rank, ...]:
        """Those of the mesh, whose first dimension is the pipeline."""
        others = self.setting.mesh.size // self.schedule.ranks
        found: list[Rank] = []
        for rank in range(self.schedule.ranks):
            for _ in range(others):
                if rank in plans:
                    of = plans[rank]
                    found.append(Rank(len(found), of.peak_bytes, of.peak.breakdown))
                else:
                    held = sum(
                        self.stages.routes.weight_bytes[s] for s in self.schedule.stages_of(rank)
                    )
                    found.append(Rank(len(found), held, {"parameter": held}))
        return tuple(found)


def _within_or_smallest(
    planner: RankPlanner[StageForecast], budget: int | None
) -> RankPlan[StageForecast]:
    try:
        return planner.within(budget)
    except BudgetError:
        return planner.smallest


class _Nobody:
    """Whom functions that are only rehearsed report to."""

    updates = Updates()

    def observe(self, outputs_held: bool, received: tuple[int, ...]) -> None:
        pass

    def named(self, error: RuntimeError) -> RuntimeError:
        return error

    def rerun(
        self, inputs: Sequence[torch.Tensor], state: RandomState, gradients: dict[int, torch.Tensor]
    ) -> list[torch.Tensor | None]:
        raise AssertionError("a rehearsal gives gradients for planned outputs only")
