"""Integer programs: what HiGHS answers is believed only near what fractions would come to."""

import itertools

import numpy as np
import pytest

from fxzero.solver import linear
from fxzero.solver.linear import LinearProgram


def knapsack(prices, sizes, room):
    """Pays the price of what is left out of a room."""
    program = LinearProgram()
    kept = [program.variable(integer=True) for _ in prices]
    left = [program.variable(cost=price) for price in prices]
    for one, other in zip(kept, left, strict=True):
        program.row({one: 1.0, other: 1.0}, lower=1.0)
    program.row(dict(zip(kept, sizes, strict=True)), upper=room)
    return program


def best_price(prices, sizes, room):
    choices = itertools.product((0, 1), repeat=len(prices))
    return min(
        sum(p for p, keep in zip(prices, choice, strict=True) if not keep)
        for choice in choices
        if np.dot(choice, sizes) <= room
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_the_best_of_all_choices(seed):
    random = np.random.default_rng(seed)
    prices, sizes = random.integers(1, 50, (2, 9))
    room = int(sizes.sum() * random.uniform(0.2, 0.8))
    answer = knapsack(prices, sizes, room).solve()
    assert answer is not None
    assert answer.cost == pytest.approx(best_price(prices, sizes, room))
    assert answer.bound == pytest.approx(answer.cost)


@pytest.fixture
def wrong_presolve(monkeypatch):
    """HiGHS as it was seen: with its presolve a poor answer is called the optimum."""
    milp, wrong = linear.milp, {}

    def solve(costs, **given):
        result = milp(costs, **given)
        if given["integrality"].any() and given["options"].get("presolve", True):
            result.update(wrong.get("answer", {}), fun=sum(costs), mip_dual_bound=sum(costs))
        return result

    monkeypatch.setattr(linear, "milp", solve)
    return wrong


def test_a_wrong_optimum_is_found_out(wrong_presolve):
    prices, sizes, room = [5, 4, 9, 2], [3, 2, 5, 1], 6
    answer = knapsack(prices, sizes, room).solve()
    assert answer is not None
    assert answer.cost == best_price(prices, sizes, room) == answer.bound < sum(prices)


def test_a_program_that_was_called_infeasible_is_solved(wrong_presolve):
    wrong_presolve["answer"] = {"x": None}
    prices, sizes, room = [5, 4, 9, 2], [3, 2, 5, 1], 6
    answer = knapsack(prices, sizes, room).solve()
    assert answer is not None
    assert answer.cost == best_price(prices, sizes, room)


def test_what_is_infeasible_stays_so():
    program = knapsack([1, 1], [1, 1], 1)
    program.row({2: 1.0, 3: 1.0}, upper=0.5)
    assert program.solve() is None
