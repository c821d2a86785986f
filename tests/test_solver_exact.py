"""On tiny problems the solver's price is that of the best of all schedules."""

from __future__ import annotations

import dataclasses

import pytest
from brute_force import cheapest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_eviction import one_value
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


# Hypothesis draws constants of all modules that are loaded, and so other graphs behind other tests;
# those for which brute force would take more than about half a second are left out.
@pytest.mark.slow
@given(problems(6, 8), st.floats(0, 1))
@settings(max_examples=300, derandomize=True, **_CALM)
def test_the_optimum_of_300_graphs_is_that_of_brute_force(problem: Problem, share: float) -> None:
    assume(decisions(problem) <= 2**22)
    check_against_brute_force(problem, share)


@given(problems(5, 4), st.floats(0, 1), st.data())
@settings(max_examples=100, derandomize=True, **_CALM)
def test_looking_closely_at_steps_never_bounds_above_brute_force(
    problem: Problem, share: float, data: st.DataObject
) -> None:
    problem = dataclasses.replace(problem, must_save=frozenset())
    assume(len(problem.bytes) <= 7 and decisions(problem) <= 2**18)
    budget = budget_at(Solver(problem), share)
    best = cheapest(problem, budget)
    assert best is not None
    steps = data.draw(st.sets(st.sampled_from(range(len(problem.reads)))))
    loose, close = (price_bound(problem, seconds, budget, at) for at in ((), steps))
    assert loose - 1e-6 <= close <= best + 1e-6


@pytest.mark.parametrize(("steps", "bound"), [((), 0.0), ((0,), 2.0)])
def test_a_close_look_sees_what_only_recompute_reads(steps: tuple[int, ...], bound: float) -> None:
    # The first step has no room for x, which is made in 2 s and read by y alone.
    problem = one_value(reads=((), (1,)), base=(100, 0))
    x = dataclasses.replace(problem.operators[0], seconds=2.0)
    y = Operator("y", 1, (0,), (1,), 0.0, 1, 0, True)
    problem = dataclasses.replace(
        problem, bytes=(10, 10), operators=(x, y), maker=(0, 1), death=(1, 1), forward_steps=2
    )
    assert price_bound(problem, seconds, 100, steps) == pytest.approx(bound)
    assert cheapest(problem, 100) == pytest.approx(2.0)


def decisions(problem: Problem) -> int:
    """How much brute force has to try at most."""
    values = sum(value not in problem.held for value in problem.needed)
    operators = [problem.operators[q] for q in problem.makers]
    again = [operator for operator in operators if operator.recomputable]
    states = sum(operator.state_bytes > 0 for operator in again)
    return len(problem.reads) * 4 ** (values + states) * 2 ** len(again)


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
