"""What stages of a row hold, and what they recompute to hold less.

The budget solver plans the whole model for budgets between no recompute and its smallest peak.
Each of these levels says of every operator what it leaves for the backward, what of it runs again,
and what is there besides while it runs; so it says the same of any stage that cuts would make.

    level 0    these layers leave 900 KiB a micro-batch      3 in flight: 2.7 MiB
    level 1    500 KiB, and recompute 2 ms                   3 in flight: 1.5 MiB
    room for 2 MiB    ->    level 1

That is an estimate to choose cuts by.  What the stages that were chosen hold is rehearsed
(``rank_plan.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxzero.cost import CostModel
from fxzero.graph_planner import GraphPlanner
from fxzero.mesh import Sharding
from fxzero.optimizers import profile_optimizer
from fxzero.options import Options
from fxzero.pipelining.cutting import Row
from fxzero.pipelining.profile import Profile, origins, weights_of
from fxzero.solver.problem import Problem
from fxzero.solver.schedule import Schedule

# Budgets that the solver is asked for between the smallest peak and no recompute.
_BETWEEN = 5

Bytes = NDArray[np.int64]
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class StageBytes:
    """What a stage of some operators holds, a row for each level, least recompute first.

    Attributes:
        static: bytes of weights, their gradients and optimizer states.
        saved: bytes that one micro-batch leaves for its backward.
        working: most bytes besides, while an operator of the stage runs.
        seconds: recompute of one micro-batch.
    """

    static: int
    saved: Bytes
    working: Bytes
    seconds: Seconds


class Footprint:
    """What stages of a model's row hold.

    Args:
        tensors: the model's parameters and buffers, by the row's names.
        levels: called when they are needed first, for they take the solver's time.
    """

    def __init__(
        self,
        row: Row,
        tensors: Mapping[str, torch.Tensor],
        options: Options,
        levels: Callable[[], Levels],
    ) -> None:
        self._levels = levels
        self._weights = [
            (_held_bytes(tensors[name], options), set(positions))
            for name, positions in weights_of(row).items()
            if name in tensors
        ]

    def stage(self, start: int, stop: int, received: int) -> StageBytes:
        """What a stage of these operators holds.

        Args:
            received: bytes that a micro-batch brings from other stages.
        """
        levels = self._levels()
        return StageBytes(
            static=sum(s for s, places in self._weights if any(start <= p < stop for p in places)),
            saved=levels.saved[:, stop] - levels.saved[:, start] + received,
            working=levels.working[:, start:stop].max(axis=1) + 2 * received,
            seconds=levels.seconds[:, stop] - levels.seconds[:, start],
        )


@dataclass(frozen=True)
class Levels:
    """What operators of a row hold and recompute, a row for each level.

    Attributes:
        saved, seconds: sums from the first operator on, from 0.
        working: of each operator.
    """

    saved: Bytes
    working: Bytes
    seconds: Seconds

    @classmethod
    def of(cls, profile: Profile, options: Options, costs: CostModel) -> Levels:
        """Those of a model under any budget and on any number of ranks."""
        alone = replace(options, memory_budget=None, sharding=Sharding(), strict=False)
        planner = GraphPlanner(
            profile.graph,
            alone,
            "",
            options.passes.preparation,
            costs,
            outputs_held=False,
            reduces=False,
            accumulates=True,
        )
        operators = profile.operators
        position = {node.name: at for node, at in origins(planner.graph).items()}
        levels = [_Level(planner, each, position, operators) for each in _schedules(planner)]
        levels.sort(key=lambda level: float(level.seconds.sum()))
        return cls(
            _from_zero(np.stack([level.saved for level in levels])),
            np.stack([level.working for level in levels]),
            _from_zero(np.stack([level.seconds for level in levels])),
        )


class _Level:
    """A schedule of the whole model, by operators of its row."""

    def __init__(
        self,
        planner: GraphPlanner,
        schedule: Schedule,
        position: Mapping[str, int],
        operators: int,
    ) -> None:
        problem = planner.solver.problem
        self.saved = np.zeros(operators, dtype=np.int64)
        self.seconds = np.zeros(operators)
        self.working = np.zeros(operators, dtype=np.int64)
        at = [position.get(operator.name, 0) for operator in problem.operators]
        for storage in schedule.saved:
            self.saved[at[problem.maker[storage]]] += problem.bytes[storage]
        for index, _ in schedule.recompute:
            self.seconds[at[index]] += problem.operators[index].seconds
        self._note_forward(schedule, problem, at)
        self._note_backward(schedule, problem, position)

    def _note_forward(self, schedule: Schedule, problem: Problem, at: Sequence[int]) -> None:
        """What is there besides what is saved while forward operators run."""
        made = np.zeros(problem.forward_steps + 1, dtype=np.int64)
        for storage in schedule.saved:
            made[problem.operators[problem.maker[storage]].position] += problem.bytes[storage]
        besides = schedule.forward - problem.fixed - np.cumsum(made)[: len(schedule.forward)]
        for operator, place in zip(problem.operators, at, strict=True):
            if not operator.fetches and operator.position < len(besides):
                self._note(place, besides[operator.position])

    def _note_backward(
        self, schedule: Schedule, problem: Problem, position: Mapping[str, int]
    ) -> None:
        """The same of the backward, where what is saved lives to its last read."""
        waiting = np.zeros(len(schedule.backward) + 1, dtype=np.int64)
        for life in schedule.lives:
            if life.start == 0:
                waiting[0] += problem.bytes[life.storage]
                waiting[life.end + 1] -= problem.bytes[life.storage]
        besides = schedule.backward - problem.fixed - np.cumsum(waiting)[: len(schedule.backward)]
        for event, step in enumerate(schedule.steps):
            if event:
                self._note(position.get(problem.steps[step], 0), besides[event])

    def _note(self, place: int, size: Any) -> None:
        self.working[place] = max(self.working[place], size)


def _schedules(planner: GraphPlanner) -> Sequence[Schedule]:
    """From no recompute to the smallest peak, as far as options allow."""
    solver = planner.solver
    if planner.recompute == "none" and not planner.offload:
        return [solver.everything]
    if planner.recompute == "full":
        return [solver.smallest]
    low, high = solver.smallest.peak, solver.everything.peak
    budgets = [low + (high - low) * i // (_BETWEEN + 1) for i in range(1, _BETWEEN + 1)]
    between = [found.schedule for b in budgets if (found := solver.solve(b)) is not None]
    return [solver.everything, *between, solver.smallest]


def _held_bytes(tensor: torch.Tensor, options: Options) -> int:
    """Bytes of a weight, its gradient and its optimizer state on one rank."""
    sharding = options.sharding
    shards = sharding.shards
    if not isinstance(tensor, torch.nn.Parameter):
        return tensor.nbytes
    part = -(-tensor.nbytes // shards)
    kept = part if sharding.zero in (3, None) or shards == 1 else part + tensor.nbytes
    if not tensor.requires_grad:
        return kept
    optimizer = profile_optimizer(options.optimizer, [tensor], "cpu")
    states = optimizer.state_bytes - optimizer.scratch_bytes
    gradient = tensor.nbytes if sharding.zero in (0, 1) else part
    return kept + gradient + -(-states // shards)


def _from_zero(table: NDArray[Any]) -> NDArray[Any]:
    """Sums along each row, from 0 on."""
    return np.pad(np.cumsum(table, axis=1), ((0, 0), (1, 0)))
