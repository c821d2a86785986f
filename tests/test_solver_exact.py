"""On tiny problems the solver's price is that of the best of all schedules."""

from __future__ import annotations

import dataclasses

import pytest
from brute_force import cheapest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_solver import peak_by_hand, problems

from fxzero.solver.bound import price_bound
from fxzero.solver.exact import ExactProgram
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.search import Solver

_CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def seconds(operator: Operator) -> float:
    return operator.seconds


def check_against_brute_force(problem: Problem, share: float) -> None:
    problem = dataclasses.replace(problem, must_save=frozenset())
    assume(len(problem.bytes) <= 8 and ExactProgram.serves(problem, 120))
    solver = Solver(problem)
    low, high = solver.smallest.peak, solver.everything.peak
    assert cheapest(problem, low - 1) is None
    budget = low + int(max(high - low, 0) * share)
    solution = solver.solve(budget)
    assert solution is not None
    assert (solution.status, solution.gap) == ("optimal", 0.0)
    assert peak_by_hand(problem, solution.schedule) <= budget
    best = cheapest(problem, budget)
    assert best is not None
    assert solution.schedule.seconds == pytest.approx(best, abs=1e-6)
    assert price_bound(problem, seconds, budget) <= best + 1e-6


@given(problems(5, 4), st.floats(0, 1))
@settings(max_examples=60, derandomize=True, **_CALM)
def test_the_optimum_of_a_few_graphs_is_that_of_brute_force(problem: Problem, share: float) -> None:
    check_against_brute_force(problem, share)


@pytest.mark.slow
@given(problems(6, 8), st.floats(0, 1))
@settings(max_examples=500, derandomize=True, **_CALM)
def test_the_optimum_of_300_graphs_is_that_of_brute_force(problem: Problem, share: float) -> None:
    check_against_brute_force(problem, share)
