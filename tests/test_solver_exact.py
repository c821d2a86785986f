"""On tiny problems the solver's price is that of the best of all schedules."""

from __future__ import annotations

import dataclasses

import pytest
from brute_force import cheapest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_solver import budget_at, peak_by_hand, problems

from fxzero.solver.bound import price_bound
from fxzero.solver.exact import ExactProgram
from fxzero.solver.frames import frame_around, open_frame
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.program import Program
from fxzero.solver.schedule import make_schedule
from fxzero.solver.search import Solver

_CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def seconds(operator: Operator) -> float:
    return operator.seconds


def check_against_brute_force(problem: Problem, share: float) -> None:
    problem = dataclasses.replace(problem, must_save=frozenset())
    assume(len(problem.bytes) <= 7 and ExactProgram.serves(problem, 120))
    solver = Solver(problem)
    assert cheapest(problem, solver.smallest.peak - 1) is None
    budget = budget_at(solver, share)
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


# 13 s alone, minutes behind other tests: Hypothesis draws constants of all modules that are loaded,
# and so other graphs, for which brute force takes longer.
@pytest.mark.exhaustive
@pytest.mark.slow
@given(problems(6, 8), st.floats(0, 1))
@settings(max_examples=300, derandomize=True, **_CALM)
def test_the_optimum_of_300_graphs_is_that_of_brute_force(problem: Problem, share: float) -> None:
    check_against_brute_force(problem, share)


@pytest.mark.slow
@given(problems(8, 6), st.floats(0, 1))
@settings(max_examples=80, derandomize=True, **_CALM)
def test_the_program_of_single_recompute_fits_and_is_not_below_the_bound(
    problem: Problem, share: float
) -> None:
    solver = Solver(problem)
    budget = budget_at(solver, share)
    schedule = Program(problem, seconds, open_frame(problem)).solve(budget)
    if schedule is not None:
        assert peak_by_hand(problem, schedule) <= schedule.peak <= budget
        assert schedule.seconds >= price_bound(problem, seconds, budget) - 1e-6


@given(problems(8, 6), st.data())
@settings(max_examples=80, derandomize=True, **_CALM)
def test_saving_more_than_a_schedule_that_fits_fits_and_is_not_dearer(
    problem: Problem, data: st.DataObject
) -> None:
    saved = data.draw(st.sets(st.sampled_from(range(len(problem.bytes)))))
    start = make_schedule(problem, (saved - problem.must_recompute) | problem.must_save)
    budget = start.peak + data.draw(st.integers(0, 200))
    extended = Program(problem, seconds, frame_around(problem, start)).solve(budget)
    assert extended is not None
    assert peak_by_hand(problem, extended) <= extended.peak <= budget
    assert extended.seconds <= start.seconds + 1e-6
