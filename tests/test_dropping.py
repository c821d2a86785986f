"""What need not run again is dropped: the rest fits, costs less, and finds all that it reads."""

from __future__ import annotations

import dataclasses

import pytest
from brute_force import cheapest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_eviction import everything, one_value, seconds
from test_solver import budget_at, peak_by_hand, problems

from fxzero.solver.dropping import (
    drop_recompute,
    trade_recompute,
    trade_together,
    without,
)
from fxzero.solver.eviction import evict
from fxzero.solver.exact import ExactProgram
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import evaluate, make_schedule
from fxzero.solver.search import Solver

_CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize(
    ("budget", "left", "peak"),
    [(100, ((0, 1), (0, 3)), 100), (109, ((0, 1), (0, 3)), 100), (110, (), 110)],
)
def test_a_value_stays_where_there_is_room(
    budget: int, left: tuple[tuple[int, int], ...], peak: int
) -> None:
    problem = one_value(reads=((), (0,), (), (0,)), base=(100, 0, 100, 0))
    schedule = drop_recompute(problem, evaluate(problem, [(0, 1), (0, 3)]), budget, seconds)
    assert (schedule.recompute, schedule.peak) == (left, peak)


def test_a_value_stays_from_the_instance_before_where_the_forward_has_no_room() -> None:
    problem = one_value(reads=((), (0,), (), (0,)), base=(100, 0, 0, 0))
    schedule = drop_recompute(problem, evaluate(problem, [(0, 1), (0, 3)]), 105, seconds)
    assert schedule.recompute == ((0, 1),)
    assert schedule.peak <= 105


def test_what_nobody_reads_any_more_goes_too() -> None:
    problem = one_value(reads=((), (1,)), base=(0, 0))
    chain = (problem.operators[0], Operator("next", 1, (0,), (1,), 1.0, 1, 0, True))
    problem = dataclasses.replace(
        problem, bytes=(50, 10), operators=chain, maker=(0, 1), death=(1, 1), forward_steps=2
    )
    both = evaluate(problem, [(0, 1), (1, 1)])
    assert without(problem, both, [(1, 1)]).recompute == ()
    assert drop_recompute(problem, both, 60, seconds).recompute == ()


def test_what_tags_ask_for_is_not_dropped() -> None:
    problem = one_value(reads=((), (0,), (0,)), base=(0, 0, 0))
    problem = dataclasses.replace(problem, must_recompute=frozenset({0}))
    schedule = drop_recompute(problem, evaluate(problem, [(0, 1), (0, 2)]), 1000, seconds)
    assert schedule.recompute == ((0, 1),)
    assert trade_recompute(problem, schedule, 1000, seconds, tries=9) == schedule
    together = trade_together(problem, schedule, 1000, seconds, tries=20, patience=20)
    assert together.recompute == schedule.recompute


@given(problems(), st.data())
def test_what_is_left_fits_and_costs_no_more(problem: Problem, data: st.DataObject) -> None:
    start = make_schedule(
        problem, problem.must_save | data.draw(st.sets(st.sampled_from(range(len(problem.bytes)))))
    )
    budget = int(start.peak * data.draw(st.floats(0.3, 1.0)))
    evicted = evict(problem, start, budget, seconds)
    if evicted is None:
        return
    dropped = drop_recompute(problem, evicted, budget, seconds)
    traded = trade_recompute(problem, dropped, budget, seconds, tries=5)
    several = {"tries": 10, "patience": 5}
    together = trade_together(problem, traded, budget, seconds, **several)
    again_together = trade_together(problem, traded, budget, seconds, **several)
    assert together.recompute == again_together.recompute
    prices = [schedule.seconds for schedule in (evicted, dropped, traded, together)]
    assert prices == sorted(prices, reverse=True)
    assert set(dropped.recompute) <= set(evicted.recompute)
    for schedule in (dropped, traded, together):
        assert peak_by_hand(problem, schedule) <= schedule.peak <= budget
        again = problem.must_recompute - problem.must_save
        assert not {s for s in schedule.saved & again if s not in start.saved}


@given(problems(5, 4), st.floats(0, 1))
@settings(max_examples=60, derandomize=True, **_CALM)
def test_no_trade_undercuts_brute_force(problem: Problem, share: float) -> None:
    problem = dataclasses.replace(problem, must_save=frozenset(), must_recompute=frozenset())
    assume(len(problem.bytes) <= 6 and ExactProgram.serves(problem, 120))
    solver = Solver(problem)
    budget = budget_at(solver, share)
    start = evict(problem, everything(problem), budget, seconds)
    if start is None:
        return
    traded = trade_recompute(problem, start, budget, seconds, tries=20)
    traded = trade_together(problem, traded, budget, seconds, tries=20, patience=20)
    best = cheapest(problem, budget)
    assert best is not None
    assert traded.seconds >= best - 1e-6
