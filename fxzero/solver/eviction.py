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

from collections.abc import Callable, Sequence

from fxzero.solver.ledger import Gap, Ledger
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Schedule

_TRIES = 20  # evictions in a row that may bring the peak no lower
_NEVER = float("inf")
_ROUNDING = 1e-9  # of sums in another order

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
    if schedule.peak <= budget:
        return schedule
    ledger = Ledger(problem, schedule)
    lowest, tries = schedule.peak, 0
    spent = total_price(problem, schedule, price)
    while tries < _TRIES and spent <= at_most:
        peak, gaps = ledger.gaps()
        if peak <= budget:
            return ledger.schedule()
        tries = 0 if peak < lowest else tries + 1
        lowest = min(lowest, peak)
        choice = Chains(ledger, price).cheapest(gaps, peak - budget)
        if choice is None:
            return None
        gap, chain, cost = choice
        spent += cost
        ledger.run_again(chain, ledger.step_of(gap.until))
    return None


class Chains:
    """What it takes to make values again, in one schedule."""

    def __init__(self, ledger: Ledger, price: Price) -> None:
        self.ledger = ledger
        self.problem = ledger.problem
        self.price = price

    def cheapest(self, gaps: Sequence[Gap], excess: int) -> tuple[Gap, set[int], float] | None:
        """The gap whose chain costs least for the bytes that it frees, with chain and cost.

        No chain costs less than the cheapest way to make the value itself.  Gaps are asked in the
        order of that, and those that cannot be cheaper than one that was found are not asked.
        """
        freed = [min(gap.bytes, excess) for gap in gaps]
        least = [(self._least(gap) / freed[at], at) for at, gap in enumerate(gaps)]
        best, answer = (_NEVER, 0), None
        for bound, at in sorted(least):
            if bound > best[0]:
                break
            found = self.chain(gaps[at], best[0] * freed[at])
            if found is None or not found[0]:
                continue
            chain, cost = found
            rank = cost / freed[at], at
            if rank < best:
                best, answer = rank, (gaps[at], chain, cost)
        return answer

    def _least(self, gap: Gap) -> float:
        operators = self.problem.operators
        return min(self.price(operators[way]) for way in self.problem.ways(gap.storage))

    def chain(self, gap: Gap, at_most: float = _NEVER) -> tuple[set[int], float] | None:
        """Operators to run besides at the end of the gap and their price; None if one cannot.

        What the value is made from, if that is not there, is fetched if this is cheaper than its
        maker alone; the value itself, if this is cheaper than all of that.

        Args:
            at_most: a price above which nobody asks for the chain.
        """
        operators = self.problem.operators
        chain = self._recompute(gap, at_most)
        cost = sum(self.price(operators[index]) for index in chain) if chain is not None else _NEVER
        fetch = self.problem.fetch.get(gap.storage)
        if fetch is not None and self.price(operators[fetch]) < cost:
            return {fetch}, self.price(operators[fetch])
        return None if chain is None else (chain, cost)

    def _recompute(self, gap: Gap, at_most: float) -> set[int] | None:
        step, limit, spent = self.ledger.step_of(gap.until), at_most * (1 + _ROUNDING), 0.0
        chain: set[int] = set()
        pending = [gap.storage]
        while pending:
            storage = pending.pop()
            ways = self.problem.ways(storage)
            if any((way, step) in self.ledger.again or way in chain for way in ways):
                continue
            index = ways[0]
            if len(ways) > 1 and storage != gap.storage:
                index = min(ways, key=self._price_if_possible)
            operator = self.problem.operators[index]
            spent += self.price(operator)
            if not operator.recomputable or spent > limit:
                return None
            chain.add(index)
            pending.extend(s for s in operator.reads if not self.ledger.is_there(s, gap.until))
        return chain

    def _price_if_possible(self, index: int) -> float:
        operator = self.problem.operators[index]
        return self.price(operator) if operator.recomputable else _NEVER
