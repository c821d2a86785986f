"""The integer program: what to save when every value is recomputed at most once.

One binary a value (saved or not) and one variable an operator (run again or not), for

    minimise   sum of price * again
    so that    saved + again(maker) >= 1                for what the backward reads,
               saved + again(maker) >= again(reader)    for what only recompute reads,
               bytes <= budget                          at every instant.

Fetching from host memory is another operator beside the maker: saved + again(maker) + again(fetch).

A value occupies memory from its first read in the backward to its last whatever is decided; what a
decision changes is the time before.  So the bytes at a step are a constant plus all saved values
that are first read later, which is a running sum over the steps: few entries a row, and programs
that HiGHS solves in a fraction of a second for a hundred layers.

Left out at first is what a recompute makes early: a chain that runs for one step also makes values
that are first read later.  The exact schedule of each answer shows where that matters, and a
*level* is added there, which says exactly what has been made by then; or, within a step, a
constant.  Levels make the integer program slow: with more than a few it is relaxed, and rounded.
What still exceeds the budget is mended by eviction (``eviction.py``), round after round, and the
cheapest of all that fit is the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from fxzero.solver.bound import running_sum
from fxzero.solver.eviction import evict, total_price
from fxzero.solver.frames import Frame, step_tops
from fxzero.solver.linear import Answer, LinearProgram
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Schedule

_SHARES = (0.25, 0.5, 0.75)  # fractions from which on a value is saved
_SMALL = 300  # variables of levels up to which the program stays an integer one
_STEPS_A_ROUND = 4

Price = Callable[[Operator], float]


class Program:
    """The program of one problem within a frame.

    Args:
        gap: how far from its optimum the program may stop, relative to the price of recompute.
        nodes: how many nodes of the search tree HiGHS may visit in each round.
        rounds: how often the program is refined.
        effort: how many variables levels may add: with more of them a round takes seconds.
    """

    def __init__(
        self,
        problem: Problem,
        price: Price,
        frame: Frame,
        *,
        gap: float = 1e-4,
        nodes: int = 200,
        rounds: int = 8,
        effort: int = 8000,
    ) -> None:
        self.problem = problem
        self.price = price
        self.gap = gap
        self.nodes = nodes
        self.rounds = rounds
        self.effort = effort
        self.linear = LinearProgram()
        self.frame = frame
        self.scale = 1.0 / (max(map(price, problem.operators), default=0.0) or 1.0)
        self.saved = {v: self._saved_variable(v) for v in problem.needed}
        self.again = {q: self._again_variable(q) for q in problem.makers}
        self._add_needs()
        self.extra = np.zeros(len(problem.reads))
        self.levels: dict[int, int] = {}
        self.forward_rows = self._add_forward()
        self.running = self._add_running_sum()
        self.rows = self._add_backward()

    def _saved_variable(self, value: int) -> int:
        problem = self.problem
        must = value in self.frame.settled
        must |= value in problem.must_save and value in self.frame.first
        must_not = value in problem.must_recompute - problem.must_save
        may_again = problem.operators[problem.maker[value]].recomputable
        upper = float(must or not must_not or not may_again)
        return self.linear.variable(lower=float(must), upper=upper, integer=True)

    def _again_variable(self, index: int) -> int:
        operator = self.problem.operators[index]
        cost = self.price(operator) * self.frame.runs.get(index, 1) * self.scale
        return self.linear.variable(cost=cost, upper=float(operator.recomputable))

    def _add_needs(self) -> None:
        problem, settled = self.problem, self.frame.settled
        for value in self.frame.first:
            if value not in settled:
                for there in self._there(value):
                    self.linear.row(there, lower=1.0)
        for index, again in self.again.items():
            for value in problem.operators[index].reads:
                if value not in self.frame.first and value not in settled:
                    for there in self._there(value):
                        self.linear.row({**there, again: -1.0}, lower=0.0)

    def _there(self, value: int) -> list[dict[int, float]]:
        """Terms of which each has to come to one for the value to be there in the backward."""
        groups = self.frame.made(self.problem, value)
        return [{self.saved[value]: 1.0, **{self.again[q]: 1.0 for q in g}} for g in groups]

    def _add_forward(self) -> list[tuple[int, float]]:
        """Rows of the forward: (row, bytes there that no decision changes)."""
        problem, natural = self.problem, self.frame.forward
        positions = problem.forward_steps
        begin: dict[int, dict[int, float]] = {}
        for value, variable in self.saved.items():
            if value in problem.outputs or value in self.frame.settled:
                continue
            if problem.death[value] + 1 < positions:
                begin.setdefault(problem.death[value] + 1, {})[variable] = problem.bytes[value]
        for index, variable in self.again.items():
            operator = problem.operators[index]
            if operator.state_bytes and self.frame.states:
                begin.setdefault(operator.position, {})[variable] = operator.state_bytes
        rows = []
        level: int | None = None
        for start, end in pairwise([0, *sorted(begin.keys() - {0}), positions]):
            if start in begin:
                level = self._accumulate(level, begin[start])
            row = self.linear.row({} if level is None else {level: 1.0})
            rows.append((row, float(natural[start:end].max(initial=0))))
        return rows

    def _add_running_sum(self) -> list[tuple[int, int]]:
        """(last step, variable) pairs: bytes held until that step, or a later one, by a decision.

        In decreasing order of steps.
        """
        problem = self.problem
        ends: dict[int, dict[int, float]] = {}
        for value, variable in self.saved.items():
            end = self.frame.until[value]
            if value not in self.frame.settled and end >= 0:
                ends.setdefault(end, {})[variable] = problem.bytes[value]
        for index, variable in self.again.items():
            operator = problem.operators[index]
            if operator.state_bytes and self.frame.states:
                until = self.frame.until
                end = max((until[v] for v in operator.makes if v in until), default=-1)
                terms = ends.setdefault(max(end, 0), {})
                terms[variable] = terms.get(variable, 0.0) + operator.state_bytes
        level: int | None = None
        running = []
        for end in sorted(ends, reverse=True):
            level = self._accumulate(level, ends[end])
            running.append((end, level))
        return running

    def _accumulate(self, level: int | None, terms: dict[int, float]) -> int:
        """A variable for ``level`` plus the given bytes."""
        return running_sum(self.linear, level, terms, self.problem.unit)

    def _add_backward(self) -> list[tuple[int, int, int]]:
        """Rows of the backward as (row, first step, last step): equal but for constants."""
        rows = []
        start = 0
        for end, level in reversed(self.running):
            rows.append((self.linear.row({level: 1.0}), start, end))
            start = end + 1
        rows.append((self.linear.row({}), start, len(self.problem.reads) - 1))
        return rows

    def _set_budget(self, budget: int) -> None:
        unit = self.problem.unit
        constants = self.frame.steps + self.extra
        for row, start, end in self.rows:
            top = constants[start : end + 1].max(initial=0.0)
            if start == 0:
                top = max(top, self.frame.loss)
            self.linear.limit(row, (budget - top) / unit)
        for row, top in self.forward_rows:
            self.linear.limit(row, (budget - top) / unit)
        for step, row in self.levels.items():
            self.linear.limit(row, (budget - constants[step]) / unit)

    def solve(self, budget: int) -> Schedule | None:
        """The cheapest schedule found within ``budget`` bytes; None if none was found."""
        best: Schedule | None = None
        for _ in range(self.rounds):
            self._set_budget(budget)
            effort = len(self.levels) * len(self.again)
            answer = None if effort > self.effort else self._answer(relaxed=effort > _SMALL)
            if answer is None:
                break
            rounded = [self._schedule(answer, s) for s in (_SHARES if self.levels else (0.5,))]
            for start in rounded:
                best = self._better(best, start, budget)
            over = [s for s in rounded if s.peak > budget]
            if not over:
                break
            self._refine(over[len(over) // 2], budget)
        return best

    def _answer(self, *, relaxed: bool) -> Answer | None:
        levels = bool(self.levels)
        return self.linear.solve(
            relative_gap=self.gap * (10 if levels else 1),
            nodes=self.nodes // 10 if levels else self.nodes,
            relaxed=relaxed,
        )

    def _better(self, best: Schedule | None, start: Schedule, budget: int) -> Schedule | None:
        """What eviction makes of ``start`` if it is cheaper than the best so far, else the best."""
        price = float("inf") if best is None else total_price(self.problem, best, self.price)
        found = evict(self.problem, start, budget, self.price, at_most=price)
        if found is None or total_price(self.problem, found, self.price) >= price:
            return best
        return found

    def _schedule(self, answer: Answer, share: float) -> Schedule:
        kept = [v for v, variable in self.saved.items() if answer.values[variable] > share]
        runs = {index: answer.values[variable] for index, variable in self.again.items()}
        ways = ((v, fetch, self.problem.maker[v]) for v, fetch in self.problem.fetch.items())
        fetched = [v for v, fetch, maker in ways if runs.get(fetch, 0) > runs.get(maker, 0)]
        return self.frame.schedule(self.problem, kept, fetched)

    def _refine(self, schedule: Schedule, budget: int) -> None:
        """Adds what the program did not know where the schedule exceeds the budget."""
        tops = step_tops(schedule)
        order = np.argsort(-tops, kind="stable")[:_STEPS_A_ROUND]
        for step in (int(i) for i in order if tops[i] > budget):
            if step not in self.levels:
                self._add_level(step)
            else:
                self.extra[step] += tops[step] - budget

    def _add_level(self, step: int) -> None:
        """Says exactly what has been made by ``step``, though its first read is later."""
        problem = self.problem
        made: dict[int, int] = {}

        def by_then(value: int) -> dict[int, float]:
            index, fetch = problem.maker[value], problem.fetch.get(value)
            if index not in made:
                made[index] = self.linear.variable()
            fetched = {} if fetch is None else {self.again[fetch]: 1.0}
            return {made[index]: 1.0, self.saved[value]: 1.0, **fetched}

        for value, first in self.frame.first.items():
            if first <= step and value not in self.frame.settled:
                self.linear.row(by_then(value), lower=1.0)
        pending = list(made)
        seen = set(pending)
        while pending:
            index = pending.pop()
            for value in problem.operators[index].reads:
                if value in self.frame.settled or self.frame.first.get(value, step + 1) <= step:
                    continue
                maker = problem.maker[value]
                self.linear.row({**by_then(value), made[index]: -1.0}, lower=0.0)
                if maker not in seen:
                    seen.add(maker)
                    pending.append(maker)
        terms = {}
        for value, first in self.frame.first.items():
            if first > step and value not in self.frame.settled:
                terms[self.saved[value]] = problem.bytes[value] / problem.unit
                maker = problem.maker[value]
                if maker in made:
                    variable = made[maker]
                    terms[variable] = terms.get(variable, 0.0) + problem.bytes[value] / problem.unit
        self.levels[step] = self.linear.row(terms)
