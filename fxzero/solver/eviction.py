"""Makes a schedule fit: what is in the way of its peak goes, and comes back for its next read.

As a cache that knows the future would do, again and again at the worst instant: of the values that
are there and not read just then, the one goes that costs least to make again for the bytes that
it frees.  It ends after its read before that instant (or is not saved at all), and before the step
of its next one it is recomputed, with whatever that needs and is not there, or fetched.

    x:  made - read - - - PEAK - - - read        x:  made - read      PEAK      made - read

Programs decide what is recomputed once; here a value may be recomputed as often as it has reads.
DTR (Kirisame et al., ICLR 2021) evicts by a similar measure while a model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Life, Schedule, evaluate

_TRIES = 20  # evictions in a row that may bring the peak no lower
_NEVER = float("inf")

Price = Callable[[Operator], float]


def total_price(problem: Problem, schedule: Schedule, price: Price) -> float:
    """What all recompute of a schedule costs."""
    return sum(price(problem.operators[index]) for index, _ in schedule.recompute)


def evict(
    problem: Problem,
    schedule: Schedule,
    budget: int,
    price: Price,
    at_most: float = _NEVER,
) -> Schedule | None:
    """A schedule within ``budget`` bytes that recomputes more; None if none was found.

    Args:
        at_most: a total price above which it is not worth going on.
    """
    lowest, tries = schedule.peak, 0
    spent = total_price(problem, schedule, price)
    while tries < _TRIES and spent <= at_most:
        if schedule.peak <= budget:
            return schedule
        tries = 0 if schedule.peak < lowest else tries + 1
        lowest = min(lowest, schedule.peak)
        excess = schedule.peak - budget
        books = _Books(problem, schedule)
        cheapest = books.cheapest(_gaps(problem, schedule), price, excess)
        if cheapest is None:
            return None
        gap, chain, cost = cheapest
        spent += cost
        schedule = books.without(gap, chain)
    return None


@dataclass(frozen=True)
class _Gap:
    """A value that may be away until its next read, at event ``until``."""

    storage: int
    bytes: int
    until: int


def _gaps(problem: Problem, schedule: Schedule) -> Iterator[_Gap]:
    """What may be away at the instant of the peak."""
    forward = schedule.forward.max(initial=0) > schedule.backward.max(initial=0)
    peak = int(np.argmax(schedule.forward if forward else schedule.backward))
    for life in schedule.lives:
        if not problem.bytes[life.storage]:
            continue
        if life.start == 0 and life.storage in problem.must_save:
            continue
        until = _saved_across(problem, life, peak) if forward else _unread_across(life, peak)
        if until is not None and (forward or schedule.steps[until] > schedule.steps[peak]):
            yield _Gap(life.storage, problem.bytes[life.storage], until)


def _saved_across(problem: Problem, life: Life, position: int) -> int | None:
    """The first read of a saved value that is dead in the forward at ``position``."""
    storage = life.storage
    if life.start > 0 or not life.reads or storage in problem.outputs:
        return None
    return life.reads[0] if problem.death[storage] < position else None


def _unread_across(life: Life, event: int) -> int | None:
    """The next read of a value that is there at ``event`` for later only."""
    if not life.start <= event < life.end or event in life.reads:
        return None
    if life.start == event > 0:
        return None
    return next(read for read in life.reads if read > event)


class _Books:
    """What is there when, in one schedule, and so what it takes to make a value again."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.problem = problem
        self.schedule = schedule
        self.again = set(schedule.recompute)
        self.lives: dict[int, list[Life]] = {}
        for life in schedule.lives:
            self.lives.setdefault(life.storage, []).append(life)

    def without(self, gap: _Gap, chain: set[int]) -> Schedule:
        """The schedule in which the value is away, and these operators run at the gap's end."""
        step = int(self.schedule.steps[gap.until])
        # Nearly in order already, which makes it cheap to sort.
        order = [*self.schedule.recompute, *((index, step) for index in chain)]
        return evaluate(self.problem, sorted(order, key=itemgetter(1, 0)))

    def cheapest(
        self, gaps: Iterable[_Gap], price: Price, excess: int
    ) -> tuple[_Gap, set[int], float] | None:
        """The gap whose chain costs least for the bytes that it frees, with chain and cost.

        No chain costs less than the cheapest way to make the value itself.  Gaps are asked in the
        order of that, and those that cannot be cheaper than one that was found are not asked.
        """

        def share(cost: float, gap: _Gap) -> float:
            return cost / min(gap.bytes, excess)

        asked = list(gaps)
        least = [(share(self._least(gap, price), gap), at) for at, gap in enumerate(asked)]
        best, answer = (_NEVER, 0), None
        for bound, at in sorted(least):
            if bound > best[0]:
                break
            found = self.chain(asked[at], price)
            if found is None or not found[0]:
                continue
            chain, cost = found
            rank = share(cost, asked[at]), at
            if rank < best:
                best, answer = rank, (asked[at], chain, cost)
        return answer

    def _least(self, gap: _Gap, price: Price) -> float:
        operators = self.problem.operators
        return min(price(operators[way]) for way in self.problem.ways(gap.storage))

    def chain(self, gap: _Gap, price: Price) -> tuple[set[int], float] | None:
        """Operators to run besides at the end of the gap and their price; None if one cannot.

        What the value is made from, if that is not there, is fetched if this is cheaper than its
        maker alone; the value itself, if this is cheaper than all of that.
        """
        operators = self.problem.operators
        chain = self._recompute(gap, price)
        cost = sum(price(operators[index]) for index in chain) if chain is not None else _NEVER
        fetch = self.problem.fetch.get(gap.storage)
        if fetch is not None and price(operators[fetch]) < cost:
            return {fetch}, price(operators[fetch])
        return None if chain is None else (chain, cost)

    def _recompute(self, gap: _Gap, price: Price) -> set[int] | None:
        step = int(self.schedule.steps[gap.until])
        chain: set[int] = set()
        pending = [gap.storage]
        while pending:
            storage = pending.pop()
            ways = self.problem.ways(storage)
            if any((way, step) in self.again or way in chain for way in ways):
                continue
            index = ways[0]
            if storage != gap.storage:
                index = min(ways, key=self._price_if_possible(price))
            operator = self.problem.operators[index]
            if not operator.recomputable:
                return None
            chain.add(index)
            pending.extend(s for s in operator.reads if not self._is_there(s, gap.until))
        return chain

    def _price_if_possible(self, price: Price) -> Callable[[int], float]:
        operators = self.problem.operators
        return lambda i: price(operators[i]) if operators[i].recomputable else _NEVER

    def _is_there(self, storage: int, event: int) -> bool:
        if storage in self.problem.held:
            return True
        return any(life.start <= event <= life.end for life in self.lives.get(storage, ()))
