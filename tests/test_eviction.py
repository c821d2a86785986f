"""Eviction: values that stand in the way of the peak go, and are recomputed as often as needed."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_solver import peak_by_hand, problems

from fxzero.solver.eviction import Chains, evict
from fxzero.solver.ledger import Ledger
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Schedule, evaluate, make_schedule, save_more


def seconds(operator: Operator) -> float:
    return operator.seconds


def one_value(reads: tuple[tuple[int, ...], ...], base: tuple[int, ...]) -> Problem:
    """One operator makes a value of 10 bytes in a second; the backward reads it now and then."""
    operator = Operator("op", 0, (), (0,), 1.0, 1, 0, True)
    return Problem(
        bytes=(10,),
        operators=(operator,),
        maker=(0,),
        death=(0,),
        forward_steps=1,
        steps=tuple(f"step{i}" for i in range(len(reads))),
        reads=reads,
        base=base,
        base_after=(0,) * len(reads),
        base_before=0,
        base_loss=0,
        fixed=0,
        outputs=frozenset(),
        held=frozenset(),
        must_save=frozenset(),
        must_recompute=frozenset(),
        seconds=1.0,
        flops=1,
    )


def everything(problem: Problem) -> Schedule:
    return make_schedule(problem, range(len(problem.bytes)))


def test_a_value_is_away_between_two_reads() -> None:
    problem = one_value(reads=((0,), (), (0,)), base=(0, 100, 0))
    assert everything(problem).peak == 110
    schedule = evict(problem, everything(problem), 105, seconds)
    assert schedule is not None
    assert schedule.saved == {0}
    assert schedule.recompute == ((0, 2),)
    assert (schedule.peak, schedule.seconds) == (100, 1.0)


def test_a_value_is_recomputed_as_often_as_it_has_to_go() -> None:
    problem = one_value(reads=((), (0,), (), (0,)), base=(100, 0, 100, 0))
    schedule = evict(problem, everything(problem), 100, seconds)
    assert schedule is not None
    assert schedule.saved == frozenset()
    assert schedule.recompute == ((0, 1), (0, 3))
    assert (schedule.peak, schedule.seconds) == (100, 2.0)


def test_what_is_read_at_the_peak_cannot_go() -> None:
    problem = one_value(reads=((), (0,)), base=(0, 100))
    assert evict(problem, everything(problem), 109, seconds) is None
    start = everything(problem)
    assert evict(problem, start, 110, seconds) is start


def many_values(count: int) -> Problem:
    """Values of 10 bytes, each made in two operators, of which the second takes i seconds more."""
    operators = []
    for i in range(count):
        operators.append(Operator(f"small{i}", 2 * i, (), (2 * i,), 0.5, 1, 0, True))
        reads, makes = (2 * i,), (2 * i + 1,)
        operators.append(Operator(f"large{i}", 2 * i + 1, reads, makes, 1.0 + i, 1, 0, True))
    reads = ((), *((2 * i + 1,) for i in reversed(range(count))))
    return dataclasses.replace(
        one_value(reads=reads, base=(1000, *([0] * count))),
        bytes=(1, 10) * count,
        operators=tuple(operators),
        maker=tuple(range(2 * count)),
        death=tuple(i | 1 for i in range(2 * count)),
        forward_steps=2 * count,
    )


@pytest.mark.parametrize("count", [8, 32, 128])
def test_what_takes_long_to_make_is_looked_into_no_further(count: int) -> None:
    asked = []

    def price(operator: Operator) -> float:
        asked.append(operator.name)
        return operator.seconds

    problem = many_values(count)
    start = make_schedule(problem, range(1, 2 * count, 2))
    schedule = evict(problem, start, start.peak - 10, price)
    assert schedule is not None
    assert schedule.recompute == ((0, count), (1, count))
    assert len(asked) < count + 10


@given(problems(), st.data())
def test_of_what_may_go_the_cheapest_goes_for_its_bytes(
    problem: Problem, data: st.DataObject
) -> None:
    start = make_schedule(
        problem, problem.must_save | data.draw(st.sets(st.sampled_from(range(len(problem.bytes)))))
    )
    excess = data.draw(st.integers(1, max(start.peak, 1)))
    ledger = Ledger(problem, start)
    ways, (_, gaps) = Chains(ledger, seconds), ledger.gaps()
    chains = [(gap, *found) for gap in gaps if (found := ways.chain(gap)) and found[0]]
    one_by_one = min(chains, key=lambda c: c[2] / min(c[0].bytes, excess), default=None)
    assert ways.cheapest(gaps, excess) == one_by_one


@given(problems(), st.data())
def test_a_ledger_has_the_bytes_of_the_schedule_evaluated_as_a_whole(
    problem: Problem, data: st.DataObject
) -> None:
    saved = problem.must_save | data.draw(st.sets(st.sampled_from(range(len(problem.bytes)))))
    ledger = Ledger(problem, make_schedule(problem, saved))
    for _ in range(4):
        whole = evaluate(problem, sorted(ledger.again, key=lambda run: (run[1], run[0])))
        assert ledger.forward.tolist() == whole.forward.tolist()
        assert ledger.backward.tolist() == whole.backward.tolist()
        peak, gaps = ledger.gaps()
        assert peak == whole.peak
        for gap in gaps:
            assert ledger.is_there(gap.storage, gap.until)
        chains = [(g, *found) for g in gaps if (found := Chains(ledger, seconds).chain(g))]
        if not chains:
            return
        gap, chain, _ = data.draw(st.sampled_from(chains))
        ledger.run_again(chain, ledger.step_of(gap.until))


@given(problems(), st.data())
def test_what_is_left_fits_by_books_kept_elsewhere(problem: Problem, data: st.DataObject) -> None:
    start = make_schedule(
        problem, problem.must_save | data.draw(st.sets(st.sampled_from(range(len(problem.bytes)))))
    )
    budget = int(start.peak * data.draw(st.floats(0.3, 1.0)))
    schedule = evict(problem, start, budget, seconds)
    if schedule is None:
        return
    assert schedule.peak <= budget
    assert peak_by_hand(problem, schedule) <= budget
    assert set(start.recompute) <= set(schedule.recompute)
    assert problem.must_save & start.saved <= schedule.saved


@given(problems(), st.data())
def test_saving_more_recomputes_less_and_nothing_that_is_saved(
    problem: Problem, data: st.DataObject
) -> None:
    values = st.sets(st.sampled_from(range(len(problem.bytes))))
    start = make_schedule(problem, data.draw(values))
    lower = evict(problem, start, int(start.peak * data.draw(st.floats(0.3, 1.0))), seconds)
    before, saved = lower or start, data.draw(values)
    after = save_more(problem, before, saved)
    peak_by_hand(problem, after)
    assert set(after.recompute) <= set(before.recompute)
    for index, _ in after.recompute:
        assert not problem.held.union(saved).issuperset(problem.operators[index].makes)
