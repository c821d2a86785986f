"""A price that no schedule within a budget can undercut, from a linear program.

Every schedule, however often it recomputes what, obeys these rows; fractions are allowed:

    a value that the backward reads is saved, or its operator runs again, or it is fetched, and
    likewise for what those operators read;
    a value that is never made again is there from the forward to its last read;
    a value that is made again is there at least when it is read;
    at some steps, where memory is scarce, all that is read later is there or made later, and what
    it is made from then is there or made later in its turn.

With the last of them at the fullest steps of a good schedule the bound is within 0.4 % of the step
on the benchmarks' models, but for budgets near the smallest peak; without, within 3 %.

Bytes that could leave the device for a price (``Relief``) are one more variable: room in all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fxzero.solver.linear import LinearProgram
from fxzero.solver.problem import Operator, Problem

Price = Callable[[Operator], float]


@dataclass(frozen=True)
class Relief:
    """Bytes of what lives throughout that may leave the device.

    Attributes:
        price: of a byte.
    """

    least: int
    most: int
    price: float


def price_bound(problem: Problem, price: Price, budget: int, steps: Collection[int] = ()) -> float:
    """The least total price of recompute within ``budget`` bytes; infinite if nothing fits.

    Args:
        steps: backward steps at which it is looked closely what is there.
    """
    return relieved_bound(problem, price, budget, Relief(0, 0, 0.0), steps)[0]


def relieved_bound(
    problem: Problem, price: Price, budget: int, relief: Relief, steps: Collection[int] = ()
) -> tuple[float, int]:
    """The least price of recompute and relief together, and how many bytes leave for it."""
    linear = LinearProgram()
    scale = 1.0 / (max(map(price, problem.operators), default=0.0) or 1.0)
    unit = problem.unit
    freed = linear.variable(
        cost=relief.price * unit * scale, lower=relief.least / unit, upper=relief.most / unit
    )
    again = {
        q: linear.variable(
            cost=price(problem.operators[q]) * scale,
            upper=float(problem.operators[q].recomputable),
        )
        for q in problem.makers
    }
    kept = {v: linear.variable() for v in problem.needed if v not in problem.held}
    last = problem.last_read
    _add_needs(problem, linear, again, kept, last)
    _add_forward(problem, linear, kept, freed, budget)
    _add_backward(problem, linear, kept, freed, last, budget)
    for step in steps:
        _add_contents(problem, linear, again, kept, freed, last, step, budget)
    answer = linear.solve()
    if answer is None:
        return float("inf"), relief.most
    return answer.bound / scale, min(math.ceil(answer.values[freed] * unit), relief.most)


def _add_needs(
    problem: Problem,
    linear: LinearProgram,
    again: dict[int, int],
    kept: dict[int, int],
    last: dict[int, int],
) -> None:
    for value, variable in kept.items():
        if value in last:
            linear.row({variable: 1.0, **_made(problem, again, value)}, lower=1.0)
    for index, reader in again.items():
        for value in set(problem.operators[index].reads) - last.keys():
            if value in kept:
                terms = {kept[value]: 1.0, **_made(problem, again, value), reader: -1.0}
                linear.row(terms, lower=0.0)


def _made(problem: Problem, again: dict[int, int], value: int) -> dict[int, float]:
    """What may make the value in the backward, as terms of a row."""
    return {again[way]: 1.0 for way in problem.ways(value)}


def _add_forward(
    problem: Problem, linear: LinearProgram, kept: dict[int, int], freed: int, budget: int
) -> None:
    natural = problem.forward_bytes
    begin: dict[int, dict[int, float]] = {}
    for value, variable in kept.items():
        if value not in problem.outputs and problem.death[value] + 1 < problem.forward_steps:
            begin.setdefault(problem.death[value] + 1, {})[variable] = problem.bytes[value]
    total: int | None = None
    for start, end in pairwise([0, *sorted(begin.keys() - {0}), problem.forward_steps]):
        if start in begin:
            total = running_sum(linear, total, begin[start], problem.unit)
        room = budget - float(natural[start:end].max(initial=0))
        terms = {} if total is None else {total: 1.0}
        linear.row({**terms, freed: -1.0}, upper=room / problem.unit)


def _add_backward(
    problem: Problem,
    linear: LinearProgram,
    kept: dict[int, int],
    freed: int,
    last: dict[int, int],
    budget: int,
) -> None:
    held = problem.held_bytes
    ends: dict[int, dict[int, float]] = {}
    for value, step in last.items():
        if value in kept:
            ends.setdefault(step, {})[kept[value]] = problem.bytes[value]
    total: int | None = None
    for step in reversed(range(len(problem.reads))):
        if step in ends:
            total = running_sum(linear, total, ends[step], problem.unit)
        terms = {} if total is None else {total: 1.0}
        room = budget - problem.base[step] - held
        for value in set(problem.reads[step]) & kept.keys():
            room -= problem.bytes[value]
            terms[kept[value]] = -problem.bytes[value] / problem.unit
        linear.row({**terms, freed: -1.0}, upper=room / problem.unit)
    if total is not None:
        room = budget - problem.base_loss - held
        linear.row({total: 1.0, freed: -1.0}, upper=room / problem.unit)


def _add_contents(
    problem: Problem,
    linear: LinearProgram,
    again: dict[int, int],
    kept: dict[int, int],
    freed: int,
    last: dict[int, int],
    step: int,
    budget: int,
) -> None:
    """Rows for what is there at a step, and for what runs again behind it."""
    there: dict[int, int] = {}
    later: dict[int, int] = {}
    pending = [v for v, read in last.items() if read >= step and v in kept]
    while pending:
        value = pending.pop()
        if value in there:
            continue
        there[value] = linear.variable(lower=float(value in problem.reads[step]))
        made = _made(problem, again, value)
        linear.row({kept[value]: 1.0, **made, there[value]: -1.0}, lower=0.0)
        for way in problem.ways(value):
            if way not in later:
                later[way] = linear.variable(upper=float(problem.operators[way].recomputable))
                linear.row({again[way]: 1.0, later[way]: -1.0}, lower=0.0)
                pending.extend(v for v in problem.operators[way].reads if v in kept)
    for value, variable in there.items():
        if last.get(value, -1) >= step:
            linear.row({variable: 1.0, **_made(problem, later, value)}, lower=1.0)
    for index, reader in later.items():
        for value in problem.operators[index].reads:
            if value in there:
                terms = {there[value]: 1.0, **_made(problem, later, value), reader: -1.0}
                linear.row(terms, lower=0.0)
    room = budget - problem.base[step] - problem.held_bytes
    terms = {variable: problem.bytes[v] / problem.unit for v, variable in there.items()}
    linear.row({**terms, freed: -1.0}, upper=room / problem.unit)


def running_sum(
    linear: LinearProgram, total: int | None, sizes: dict[int, float], unit: float
) -> int:
    """A variable for ``total`` plus the bytes of the given variables, in units."""
    result = linear.variable(upper=np.inf)
    row = {result: 1.0, **{variable: -size / unit for variable, size in sizes.items()}}
    if total is not None:
        row[total] = -1.0
    linear.row(row, lower=0.0, upper=0.0)
    return result
