"""Chooses what to save and what to recompute, where and how often, under a peak of bytes.

Every schedule that is considered is judged by its exact bytes at every instant.

    small problem     the program over time (``exact.py``): the optimum, proven
    any other         the program of single recompute (``program.py``), near its own optimum, with
                      a bound on what any schedule could do (``bound.py``)
    near the floor    eviction (``eviction.py``) from what the program or cuts (``cuts.py``) save,
                      less what need not run again then (``dropping.py``)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from fxzero.solver.bound import Relief, price_bound, relieved_bound
from fxzero.solver.cuts import CutGraph
from fxzero.solver.dropping import drop_recompute, trade_recompute, trade_together
from fxzero.solver.eviction import evict
from fxzero.solver.exact import ExactProgram
from fxzero.solver.frames import Frame, frame_around, fullest_steps, open_frame
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.program import Program
from fxzero.solver.schedule import Schedule, make_schedule

_EXACT = 120  # decisions up to which the program over time is solved to its end
_TRIED = 1500  # decisions up to which its root node is tried besides, if the gap is wider than
_WORTHWHILE = 0.005  # this share of the step
_CLOSE = 1000  # operators up to which the program is solved more closely
_FEW = 100  # operators up to which tighter budgets are tried too
_TIGHTER = (0.02, 0.04)  # of what lies between the smallest peak and no recompute
_PROVEN = 1e-6
_TRADES = 100  # recomputes that may be traded for cheaper ones, where the gap is wide
_DRAWS, _PATIENCE = 200, 80  # of several that are traded at once,
_DRAWN = 40_000  # less where so many operators were looked at
_LOOKS = 4  # steps at which the bound looks at what is there
_HALVINGS = 6  # of the distance between the smallest peak and no recompute
_STRIDE, _LEAST_STRIDE = 0.02, 0.004


@dataclass(frozen=True)
class Solution:
    """A schedule and how good it is known to be.

    Attributes:
        status: "optimal" if no schedule is cheaper, else "feasible".
        gap: proven distance from the cheapest schedule, relative to the price of the whole step;
            None when no bound was asked for.
    """

    schedule: Schedule
    status: str
    gap: float | None


class Solver:
    """Solves one problem for any number of budgets.

    Args:
        objective: what recompute costs, "time" or "flops".
    """

    def __init__(self, problem: Problem, *, objective: str = "time") -> None:
        self.problem = problem
        self.objective = objective
        self.close = len(problem.operators) <= _CLOSE

    def price(self, schedule: Schedule) -> float:
        """What the schedule's recompute costs: seconds, or FLOPs and a little for each second."""
        if self.objective == "time":
            return schedule.seconds
        return schedule.flops + self._second * schedule.seconds

    def operator_price(self, operator: Operator) -> float:
        """What running the operator once more costs."""
        if self.objective == "time":
            return operator.seconds
        return operator.flops + self._second * operator.seconds

    def price_of_seconds(self, seconds: float) -> float:
        """What time that is neither recompute's nor a transfer's in a graph costs."""
        return seconds if self.objective == "time" else self._second * seconds

    @cached_property
    def _second(self) -> float:
        """FLOPs that a second counts as under the "flops" objective: it decides between equals."""
        return 1e-4 * self.problem.flops / (self.problem.seconds or 1.0)

    @cached_property
    def everything(self) -> Schedule:
        """Nothing recomputed but what tags ask for."""
        return make_schedule(self.problem, self._allowed(range(len(self.problem.bytes))))

    @cached_property
    def cuts(self) -> list[Schedule]:
        """Schedules of cuts, cheapest first, none beaten in both peak and price."""
        saved = [self._allowed(s) for f in (False, True) for s in CutGraph(self.problem, f).sweep()]
        made = [make_schedule(self.problem, choice) for choice in dict.fromkeys(saved)]
        return self._undominated([self.everything, *made])

    @cached_property
    def smallest(self) -> Schedule:
        """The schedule with the smallest peak that is found, whatever it costs.

        Nothing is dropped from it: what operators have room for, generated code may not need.
        """
        if self._exact is not None:
            return self._exact.smallest()
        return self._descend(min(self.cuts, key=lambda s: (s.peak, self.price(s))))

    def solve(self, budget: int | None) -> Solution | None:
        """The cheapest schedule found within ``budget`` bytes; None below ``smallest``."""
        if budget is None or self.everything.peak <= budget:
            return Solution(self.everything, "optimal", 0.0)
        if budget < self.smallest.peak:
            return None
        if self._exact is not None and (solved := self._exact.solve(budget)) is not None:
            return self._judge(*solved)
        best = self._best(budget)
        bound = price_bound(self.problem, self.operator_price, budget, self.fullest(best))
        solution = self._judge(best, bound)
        if not self.close or solution.gap is None or solution.gap <= _WORTHWHILE:
            return solution
        best = self._traded(best, budget)
        if ExactProgram.serves(self.problem, _TRIED):
            program = ExactProgram(self.problem, self.operator_price)
            if (tried := program.solve(budget, nodes=1)) is not None:
                exact, proven = tried
                best, bound = min(exact, best, key=self._rank), max(bound, proven)
        return self._judge(best, bound)

    def relieved(
        self, budget: int, relief: Relief, steps: Collection[int] = ()
    ) -> tuple[float, int]:
        """A bound on the price of recompute and relief together, and about how many bytes leave."""
        return relieved_bound(self.problem, self.operator_price, budget, relief, steps)

    def fullest(self, schedule: Schedule) -> Collection[int]:
        """The steps of a schedule at which a bound looks."""
        return fullest_steps(schedule, _LOOKS)

    def judge(self, schedule: Schedule, price: float, bound: float) -> Solution:
        """A schedule that costs ``price``, where nothing can cost less than ``bound``."""
        excess = max(price - bound, 0.0)
        if excess <= _PROVEN * max(price, self.whole):
            return Solution(schedule, "optimal", 0.0)
        return Solution(schedule, "feasible", excess / (self.whole + price))

    def least_peak(self, share: float) -> Solution:
        """The smallest peak that is found for a share of the price of the whole step.

        What tags or a ZeRO stage have settled to run again does not count.
        """
        best = Solution(self.everything, "optimal", 0.0)
        most = self.price(self.everything) + share * self.whole
        low, high = self.smallest.peak, self.everything.peak
        for _ in range(_HALVINGS):
            solution = self.solve((low + high) // 2)
            if solution is not None and self.price(solution.schedule) <= most:
                best, high = solution, solution.schedule.peak
            else:
                low = (low + high) // 2
        return best

    @cached_property
    def _exact(self) -> ExactProgram | None:
        if not ExactProgram.serves(self.problem, _EXACT):
            return None
        return ExactProgram(self.problem, self.operator_price)

    @cached_property
    def _open(self) -> Frame:
        return open_frame(self.problem)

    def _program(self, frame: Frame) -> Program:
        gap, nodes = (1e-4, 200) if self.close else (1e-3, 50)
        return Program(self.problem, self.operator_price, frame, gap=gap, nodes=nodes)

    def _best(self, budget: int) -> Schedule:
        program = self._program(self._open)
        found = program.solve(budget)
        if found is not None and not program.levels:
            return found
        known = [evict(self.problem, cut, budget, self.operator_price) for cut in self.cuts]
        fitting = [s for s in (self.smallest, found, *known) if s is not None]
        starts = [min(fitting, key=self._rank), *self._tighter(budget)]
        more = [self._program(frame_around(self.problem, s)).solve(budget) for s in starts]
        answers = [self._dropped(s, budget) for s in (*starts, *more) if s is not None]
        return min(answers, key=self._rank)

    def _dropped(self, schedule: Schedule, budget: int) -> Schedule:
        return drop_recompute(self.problem, schedule, budget, self.operator_price)

    def _traded(self, schedule: Schedule, budget: int) -> Schedule:
        problem, price = self.problem, self.operator_price
        draws = min(_DRAWS, _DRAWN // len(problem.operators))
        schedule = trade_recompute(problem, schedule, budget, price, _TRADES)
        return trade_together(problem, schedule, budget, price, tries=draws, patience=_PATIENCE)

    def _tighter(self, budget: int) -> list[Schedule]:
        """Answers for a little less: where few values matter, the best may be there."""
        if len(self.problem.operators) > _FEW:
            return []
        room = self.everything.peak - self.smallest.peak
        found = [self._program(self._open).solve(int(budget - room * s)) for s in _TIGHTER]
        return [schedule for schedule in found if schedule is not None]

    def _rank(self, schedule: Schedule) -> tuple[float, int]:
        return self.price(schedule), schedule.peak

    def _descend(self, best: Schedule) -> Schedule:
        """A smaller peak: goes down in strides that grow while something is found."""
        low, stride = self._unavoidable(), _STRIDE
        while stride >= _LEAST_STRIDE and best.peak > low:
            target = max(int(best.peak * (1 - stride)), low)
            found = evict(self.problem, best, target, self.operator_price)
            if found is None:
                found = Program(
                    self.problem,
                    self.operator_price,
                    self._open,
                    gap=0.01,
                    nodes=20,
                    rounds=1,
                ).solve(target)
            if found is None:
                low, stride = target + 1, stride / 4
            else:
                best, stride = found, stride * 2
        return best

    def _unavoidable(self) -> int:
        """Bytes below which no schedule's peak can be."""
        problem = self.problem
        held = problem.held_bytes
        reads = (sum(problem.bytes[v] for v in set(r) - problem.held) for r in problem.reads)
        steps = (base + size for base, size in zip(problem.base, reads, strict=True))
        forward = int(problem.forward_bytes.max(initial=problem.fixed))
        return max(forward, held + max(steps, default=0), held + problem.base_loss)

    def _judge(self, schedule: Schedule, bound: float) -> Solution:
        return self.judge(schedule, self.price(schedule), bound)

    @property
    def whole(self) -> float:
        """The price of one forward and backward without any recompute."""
        return self.problem.seconds if self.objective == "time" else float(self.problem.flops)

    def _allowed(self, saved: Iterable[int]) -> frozenset[int]:
        return (frozenset(saved) - self.problem.must_recompute) | self.problem.must_save

    def _undominated(self, schedules: list[Schedule]) -> list[Schedule]:
        kept: list[Schedule] = []
        for schedule in sorted(schedules, key=lambda s: (self.price(s), s.peak)):
            if not kept or schedule.peak < kept[-1].peak:
                kept.append(schedule)
        return kept
