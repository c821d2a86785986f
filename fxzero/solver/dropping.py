"""Takes out of a schedule what need not run again.

Without one recompute its value stays from its instance before, or from the forward.  Where there is
room for it all that time, the recompute is dropped, and with it those whose values nobody reads any
more.  Eviction, which looks at one full instant after the other, leaves such recomputes behind.

    x:  made - read         made - read           x:  made - read - - - - - - - - - read
              (room for x meanwhile)

Where there is no room, a recompute can be *traded*: without it, eviction looks for something
cheaper to run again.  So can several at once, which leads out of what single trades end in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fxzero.solver.eviction import evict, total_price
from fxzero.solver.problem import Operator, Problem
from fxzero.solver.schedule import Life, Schedule, evaluate

Price = Callable[[Operator], float]
Run = tuple[int, int]  # (operator, backward step it runs before)

_GAIN = 1e-9  # of a price, below which it is not another one
_TOGETHER = (1, 2, 3, 4, 6, 8)  # how many recomputes, or neighbours on either side, are traded


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
    for run in _dearest(problem, schedule, price)[:tries]:
        if run in schedule.recompute:
            schedule = _traded(problem, schedule, [run], budget, price) or schedule
    return schedule


def trade_together(
    problem: Problem,
    schedule: Schedule,
    budget: int,
    price: Price,
    *,
    tries: int,
    patience: int,
) -> Schedule:
    """The same with several recomputes at once, drawn among all or among neighbours in time.

    This is large neighbourhood search (Shaw, CP 1998), with eviction in the place of the search.

    Args:
        tries: how many draws there are at most; each call draws the same.
        patience: how many of them in a row may find nothing cheaper.
    """
    draw, last = random.Random(0), 0
    for attempt in range(tries):
        if attempt - last > patience or not schedule.recompute:
            break
        runs = _drawn(draw, schedule.recompute)
        if (found := _traded(problem, schedule, runs, budget, price)) is not None:
            schedule, last = found, attempt
    return schedule


def _drawn(draw: random.Random, runs: Sequence[Run]) -> list[Run]:
    count = draw.choice(_TOGETHER)
    if draw.random() < 0.5:
        return draw.sample(runs, min(count, len(runs)))
    at = draw.randrange(len(runs))
    near = runs[max(at - count, 0) : at + count]
    return [run for run in near if draw.random() < 0.5] or [runs[at]]


def _traded(
    problem: Problem, schedule: Schedule, runs: Iterable[Run], budget: int, price: Price
) -> Schedule | None:
    """A cheaper schedule that is found without these recomputes."""
    dropped = [run for run in runs if not _is_settled(problem, schedule, run)]
    if not dropped:
        return None
    paid = total_price(problem, schedule, price)
    found = evict(problem, without(problem, schedule, dropped), budget, price, at_most=paid)
    if found is None:
        return None
    found = drop_recompute(problem, found, budget, price)
    return found if total_price(problem, found, price) < paid * (1 - _GAIN) else None


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
