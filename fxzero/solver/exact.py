"""The program over time: any value may be recomputed before any backward step, any number of times.

Proves optima, for problems small enough (``program.py`` serves the others).  Before each step it
decides which operators run again and which values are carried on:

    here(value, step)     the value is there when the step begins
    again(operator, step) the operator runs once more right before the step, operators in order
    alive(value, moment)  it is still needed after that operator within the step

Checkmate (Jain et al., MLSys 2020) is the model for this; here only the backward has a choice, and
bytes are counted in storages.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxzero.solver.linear import Answer, LinearProgram
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Schedule, evaluate

_NODES = 20_000

Price = Callable[[Operator], float]


class ExactProgram:
    """All schedules of a problem, as one integer program."""

    def __init__(self, problem: Problem, price: Price) -> None:
        self.problem = problem
        self.price = price
        self.linear = LinearProgram()
        self.steps = len(problem.reads)
        self.values = [v for v in problem.needed if v not in problem.held]
        self.operators = sorted(q for q in problem.makers if problem.operators[q].recomputable)
        scale = max((price(problem.operators[q]) for q in self.operators), default=0.0) or 1.0
        self.scale = 1.0 / scale
        self.limits: list[tuple[int, float]] = []
        self.over = self.linear.variable(upper=0.0)
        self._add_variables()
        self._add_needs()
        self._add_forward()
        self._add_backward()

    @staticmethod
    def serves(problem: Problem, decisions: int) -> bool:
        """Whether the program of a problem is exact and has at most so many decisions.

        An operator that makes a value that the caller holds and another one besides would make a
        second instance of the first, which the program does not know; neither does it know fetches.
        """
        makers = set(problem.makers)
        held = {problem.maker[v] for v in problem.held}
        mixed = any(not set(problem.operators[q].makes) <= problem.held for q in held & makers)
        simple = not mixed and not problem.fetch
        return len(problem.reads) * len(makers) <= decisions and simple

    def _add_variables(self) -> None:
        problem, linear = self.problem, self.linear
        self.again = {
            (q, step): linear.variable(
                cost=self.price(problem.operators[q]) * self.scale, integer=True
            )
            for q in self.operators
            for step in range(self.steps)
        }
        self.here = {}
        for value in self.values:
            must_not = value in problem.must_recompute - problem.must_save
            must_not &= problem.operators[problem.maker[value]].recomputable
            for step in range(self.steps + 1):
                may = step < self.steps and not (step == 0 and must_not)
                self.here[value, step] = linear.variable(upper=float(may), integer=True)
        # The generator's state of an operator, from the forward to its last recompute.
        self.state = {
            (q, step): linear.variable()
            for q in self.operators
            if problem.operators[q].state_bytes
            for step in range(self.steps)
        }

    def _made(self, value: int, step: int) -> dict[int, float]:
        """What may have made the value right before the step, as terms of a row."""
        again = self.again.get((self.problem.maker[value], step))
        return {} if again is None or value in self.problem.must_save else {again: 1.0}

    def _add_needs(self) -> None:
        problem, linear = self.problem, self.linear
        for step, reads in enumerate(problem.reads):
            there = {v: {self.here[v, step]: 1.0, **self._made(v, step)} for v in self.values}
            for value in set(reads) - problem.held:
                linear.row(there[value], lower=1.0)
            for index in self.operators:
                for value in set(problem.operators[index].reads) - problem.held:
                    linear.row({**there[value], self.again[index, step]: -1.0}, lower=0.0)
            for value in self.values:
                linear.row({**there[value], self.here[value, step + 1]: -1.0}, lower=0.0)
        for (index, step), state in self.state.items():
            linear.row({state: 1.0, self.again[index, step]: -1.0}, lower=0.0)
            if step + 1 < self.steps:
                linear.row({state: 1.0, self.state[index, step + 1]: -1.0}, lower=0.0)

    def _limit(self, terms: dict[int, float], constant: float) -> None:
        """A row "bytes <= budget"; the constant is subtracted when the budget is known."""
        scaled = {variable: size / self.problem.unit for variable, size in terms.items()}
        self.limits.append((self.linear.row({**scaled, self.over: -1.0}), constant))

    def _add_forward(self) -> None:
        problem = self.problem
        natural = problem.forward_bytes
        for position in range(problem.forward_steps):
            terms: dict[int, float] = {}
            for value in self.values:
                if value not in problem.outputs and problem.death[value] < position:
                    terms[self.here[value, 0]] = problem.bytes[value]
            for index in self.operators:
                operator = problem.operators[index]
                if operator.state_bytes and operator.position <= position:
                    terms[self.state[index, 0]] = operator.state_bytes
            self._limit(terms, float(natural[position]))

    def _add_backward(self) -> None:
        problem = self.problem
        held = float(problem.held_bytes)
        saved = {self.here[v, 0]: float(problem.bytes[v]) for v in self.values}
        self._limit({**saved, **self._states(0)}, problem.base_loss + held)
        left = problem.base_before
        for step in range(self.steps):
            self._add_moments(step, left + held)
            self._limit(*self._at_step(step, problem.base[step] + held))
            left = problem.base_after[step]

    def _states(self, step: int) -> dict[int, float]:
        return {
            variable: float(self.problem.operators[index].state_bytes)
            for (index, at), variable in self.state.items()
            if at == step
        }

    def _at_step(self, step: int, constant: float) -> tuple[dict[int, float], float]:
        reads = set(self.problem.reads[step])
        terms = self._states(step + 1)
        for value in self.values:
            size = float(self.problem.bytes[value])
            if value in reads:
                constant += size
            else:
                terms[self.here[value, step + 1]] = size
        return terms, constant

    def _add_moments(self, step: int, constant: float) -> None:
        """A row for the moment at which each operator runs again before the step."""
        problem = self.problem
        alive = {value: self._alive(value, step) for value in self.values}
        for index in self.operators:
            terms: dict[int, float] = {}
            for value in self.values:
                for variable in alive[value](index):
                    terms[variable] = terms.get(variable, 0.0) + problem.bytes[value]
            for other, at in self.state:
                if (at, other >= index) in ((step, True), (step + 1, False)):
                    terms[self.state[other, at]] = problem.operators[other].state_bytes
            for value in problem.operators[index].makes:
                if value not in problem.held and (value, step) not in self.here:  # never read
                    again = self.again[index, step]
                    terms[again] = terms.get(again, 0.0) + problem.bytes[value]
            self._limit(terms, constant)

    def _alive(self, value: int, step: int) -> Callable[[int], list[int]]:
        """From an operator to the variables that say whether the value lives while it runs."""
        problem, linear = self.problem, self.linear
        maker = problem.maker[value]
        readers = [q for q in self.operators if value in problem.operators[q].reads]
        # needed[q]: still needed while q runs, for q after the maker; the last is "after all".
        later = linear.variable(lower=float(value in problem.reads[step]))
        linear.row({later: 1.0, self.here[value, step + 1]: -1.0}, lower=0.0)
        needed: dict[int, int] = {}
        for index in reversed(self.operators):
            if index <= maker:
                break
            if index in readers:
                previous, later = later, linear.variable()
                linear.row({later: 1.0, previous: -1.0}, lower=0.0)
                linear.row({later: 1.0, self.again[index, step]: -1.0}, lower=0.0)
            needed[index] = later
        at_maker = linear.variable()
        linear.row({at_maker: 1.0, self.here[value, step]: -1.0}, lower=0.0)
        if (maker, step) in self.again:
            linear.row({at_maker: 1.0, self.again[maker, step]: -1.0}, lower=0.0)

        def at(index: int) -> list[int]:
            if index < maker:
                return [self.here[value, step]]
            return [at_maker] if index == maker else [needed[index]]

        return at

    def solve(self, budget: int, *, nodes: int = _NODES) -> tuple[Schedule, float] | None:
        """The cheapest schedule within ``budget`` bytes, and the price that none goes below.

        None if there is none, or none within the limit on nodes.
        """
        for row, constant in self.limits:
            self.linear.limit(row, (budget - constant) / self.problem.unit)
        answer = self.linear.solve(nodes=nodes)
        if answer is None:
            return None
        return self._schedule(answer), answer.bound / self.scale

    def _schedule(self, answer: Answer) -> Schedule:
        order = [
            (index, step)
            for step in range(self.steps)
            for index in self.operators
            if answer.values[self.again[index, step]] > 0.5
        ]
        return evaluate(self.problem, order)

    def smallest(self) -> Schedule:
        """The schedule with the smallest peak."""
        costs, upper = list(self.linear.costs), self.linear.upper[self.over]
        for row, constant in self.limits:
            self.linear.limit(row, -constant / self.problem.unit)
        self.linear.costs = [cost * 1e-9 for cost in costs]
        self.linear.costs[self.over], self.linear.upper[self.over] = 1.0, np.inf
        answer = self.linear.solve(nodes=_NODES)
        self.linear.costs, self.linear.upper[self.over] = costs, upper
        assert answer is not None, "saving everything is always possible"
        return self._schedule(answer)
