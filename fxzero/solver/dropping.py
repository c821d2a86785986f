"""Takes out of a schedule what need not run again.

Without one recompute its value stays from its instance before, or from the forward.  Where there is
room for it all that time, the recompute is dropped, and with it those whose values nobody reads any
more.  Eviction, which looks at one full instant after the other, leaves such recomputes behind.

    x:  made - read         made - read           x:  made - read - - - - - - - - - read
              (room for x meanwhile)

Where there is no room, a recompute can be *traded*: without it, eviction looks for something
cheaper to run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fxzero.solver.eviction import evict, total_price
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Life, Schedule, evaluate

Price = Callable[[Operator], float]
Run = tuple[int, int]  # (operator, backward step it runs before)


def drop_recompute(problem: Problem, schedule: Schedule, budget: int, price: Price) -> Schedule:
    """A schedule within ``budget`` bytes, as the given one is, without what need not run again.

    The dearest recomputes are dropped first.
    """
    while True:
        runs = _Room(problem, schedule, budget).spared(price)
        if not runs:
            return schedule
        schedule = without(problem, schedule, runs)


def trade_recompute(
    problem: Problem, schedule: Schedule, budget: int, price: Price, tries: int
) -> Schedule:
    """The cheapest of the schedules that dropping a recompute and evicting comes to.

    Args:
        tries: how many recomputes are looked at, the dearest first.
    """
    paid, pending = total_price(problem, schedule, price), _dearest(problem, schedule, price)
    for run in pending[:tries]:
        if run not in schedule.recompute or _is_settled(problem, schedule, run):
            continue
        start = without(problem, schedule, [run])
        found = evict(problem, start, budget, price, at_most=paid)
        if found is None:
            continue
        found = drop_recompute(problem, found, budget, price)
        if total_price(problem, found, price) < paid:
            schedule, paid = found, total_price(problem, found, price)
    return schedule


def without(problem: Problem, schedule: Schedule, runs: Iterable[Run]) -> Schedule:
    """The schedule without these recomputes, and without those that nobody needs then."""
    dropped = set(runs)
    schedule = evaluate(problem, [run for run in schedule.recompute if run not in dropped])
    while unread := _unread(problem, schedule):
        schedule = evaluate(problem, [run for run in schedule.recompute if run not in unread])
    return schedule


def _unread(problem: Problem, schedule: Schedule) -> set[Run]:
    """Recomputes whose values nobody reads."""
    read = {life.start for life in schedule.lives if life.reads}
    return {
        run
        for event, run in _events(schedule)
        if event not in read and problem.held.isdisjoint(problem.operators[run[0]].makes)
    }


def _events(schedule: Schedule) -> Iterable[tuple[int, Run]]:
    """Recomputes and the backward events at which they run."""
    return ((1 + at + run[1], run) for at, run in enumerate(schedule.recompute))


def _dearest(problem: Problem, schedule: Schedule, price: Price) -> list[Run]:
    return sorted(schedule.recompute, key=lambda run: (-price(problem.operators[run[0]]), run))


def _is_settled(problem: Problem, schedule: Schedule, run: Run) -> bool:
    """Whether tags ask for a recompute: no earlier one makes what the forward may not save."""
    settled = problem.must_recompute - problem.must_save
    if settled.isdisjoint(problem.operators[run[0]].makes):
        return False
    makes = settled.intersection(problem.operators[run[0]].makes)
    earlier = schedule.recompute[: schedule.recompute.index(run)]
    return not makes <= {s for index, _ in earlier for s in problem.operators[index].makes}


class _Room:
    """The bytes of a schedule at every instant, as values come to stay longer."""

    def __init__(self, problem: Problem, schedule: Schedule, budget: int) -> None:
        self.problem = problem
        self.schedule = schedule
        self.forward = budget - schedule.forward
        self.backward = budget - schedule.backward
        self.lives: dict[int, list[Life]] = {}
        for life in sorted(schedule.lives, key=lambda life: life.start):
            self.lives.setdefault(life.storage, []).append(life)

    def spared(self, price: Price) -> list[Run]:
        """Recomputes that need not run, taken together; their values then stay from before."""
        event_of = {run: event for event, run in _events(self.schedule)}
        changed: set[int] = set()
        spared = []
        for run in _dearest(self.problem, self.schedule, price):
            makes = set(self.problem.operators[run[0]].makes)
            if not changed.isdisjoint(makes) or not self.problem.held.isdisjoint(makes):
                continue
            if not _is_settled(self.problem, self.schedule, run) and self._extend(
                makes, event_of[run]
            ):
                changed |= makes
                spared.append(run)
        return spared

    def _extend(self, storages: Iterable[int], event: int) -> bool:
        """Lets values stay until the event that makes them anew, if there is room for all."""
        taken: list[tuple[np.ndarray, int]] = []
        for storage in storages:
            lives = self.lives.get(storage, ())
            at = next((i for i, life in enumerate(lives) if life.start == event), None)
            if at is None or not lives[at].reads:
                continue
            size = self.problem.bytes[storage]
            for part in self._between(storage, lives, at):
                taken.append((part, size))
                part -= size
        if all(part.min(initial=0) >= 0 for part, _ in taken):
            return True
        for part, size in taken:
            part += size
        return False

    def _between(self, storage: int, lives: Sequence[Life], at: int) -> list[np.ndarray]:
        """Room at the instants from the instance before to the next, which make it one."""
        if at:
            return [self.backward[lives[at - 1].end + 1 : lives[at].start]]
        death = self.problem.death[storage]
        forward = self.forward[: 0 if storage in self.problem.outputs else None]
        return [forward[death + 1 :], self.backward[: lives[at].start]]
