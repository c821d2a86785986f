"""Chooses what to save and what to recompute under a peak of bytes.

Two stages, both judged by the exact schedule of every candidate:

1. *Cuts.*  Saving everything that is live across a position of the forward splits the backward
   into segments that recompute from there.  A shortest path over positions finds, for a target
   peak, the cuts that save the fewest bytes; a sweep over targets gives candidates from "save all"
   to the smallest reachable peak.  Per-block checkpointing is one of these choices.
2. *Upgrades.*  From a candidate within the budget, values are saved in the order of recompute
   time spared per byte, as long as every instant stays within the budget.

The smallest peak does not depend on the budget, so a budget is met exactly if it is not below it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxzero.problem import Problem
from fxzero.schedule import Schedule, make_schedule

_TARGETS = 40
_POSITIONS = 400
_UPGRADED_CANDIDATES = 4
_UPGRADE_ROUNDS = 4
# Larger than any number of bytes, and small enough that three of them add up.
_NEVER = 1 << 60

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Solution:
    """A schedule and how good it is known to be.

    Attributes:
        status: "optimal" when nothing is recomputed, else "feasible".
        gap: 0.0 when optimal, None when no bound is known.
    """

    schedule: Schedule
    status: str
    gap: float | None


class Solver:
    """Solves one problem for any number of budgets; the candidates are made once."""

    def __init__(self, problem: Problem, *, objective: str = "time") -> None:
        self.problem = problem
        self.price: Callable[[Schedule], float] = (
            (lambda s: float(s.flops)) if objective == "flops" else (lambda s: s.seconds)
        )
        self.operator_price = [
            float(o.flops) + 1e-3 if objective == "flops" else o.seconds for o in problem.operators
        ]

    @cached_property
    def everything(self) -> Schedule:
        """Nothing recomputed but what tags ask for."""
        return make_schedule(self.problem, self._allowed(range(len(self.problem.bytes))))

    @cached_property
    def candidates(self) -> list[Schedule]:
        """Distinct schedules, cheapest first, none beaten in both peak and price."""
        found = [self.everything]
        for follow_reads in (False, True):
            graph = _CutGraph(self.problem, follow_reads)
            choices = dict.fromkeys(self._allowed(saved) for saved in graph.sweep())
            found += [make_schedule(self.problem, saved) for saved in choices]
        found = [self._improve(schedule) for schedule in _undominated(found, self.price)]
        return _undominated(found, self.price)

    @cached_property
    def smallest(self) -> Schedule:
        """The schedule with the smallest peak."""
        return min(self.candidates, key=lambda s: (s.peak, self.price(s)))

    def solve(self, budget: int | None) -> Solution | None:
        """The cheapest schedule found within ``budget`` bytes; None if no candidate fits."""
        if budget is None or self.everything.peak <= budget:
            return Solution(self.everything, "optimal", 0.0)
        fitting = [s for s in self.candidates if s.peak <= budget]
        if not fitting:
            return None
        starts = {id(s): s for s in (*fitting[:_UPGRADED_CANDIDATES], fitting[-1])}
        upgraded = [_upgrade(self, start, budget) for start in starts.values()]
        best = min(upgraded, key=lambda s: (self.price(s), s.peak))
        return Solution(best, "feasible", None)

    def _allowed(self, saved: Iterable[int]) -> frozenset[int]:
        return (frozenset(saved) - self.problem.must_recompute) | self.problem.must_save

    def _improve(self, schedule: Schedule) -> Schedule:
        """The same peak or less, cheaper: save what fits under the peak that is there anyway."""
        return _upgrade(self, schedule, schedule.peak)


def _undominated(schedules: list[Schedule], price: Callable[[Schedule], float]) -> list[Schedule]:
    kept: list[Schedule] = []
    for schedule in sorted(schedules, key=lambda s: (price(s), s.peak)):
        if not kept or schedule.peak < kept[-1].peak:
            kept.append(schedule)
    return kept


class _CutGraph:
    """Positions of the forward as vertices; an edge is a segment recomputed as one.

    Args:
        follow_reads: whether a value counts as live until the backward's first read of it is due,
            and not only until the forward's last read.  Better where early values are read early in
            the backward (auxiliary losses, skips), worse where that ties up large values.
    """

    def __init__(self, problem: Problem, follow_reads: bool) -> None:
        self.problem = problem
        self.follow_reads = follow_reads
        self.relevant = _needed_storages(problem)
        self.positions, self.across = self._narrow_positions()
        self._measure()

    def _narrow_positions(self) -> tuple[list[int], list[frozenset[int]]]:
        """Where few bytes are live across: vertices, and what to save there."""
        problem = self.problem
        births: dict[int, list[int]] = {}
        deaths: dict[int, list[int]] = {}
        for storage in self.relevant:
            operator = problem.operators[problem.maker[storage]]
            last = self._last_use[storage]
            if last > operator.position:
                births.setdefault(operator.position, []).append(storage)
                deaths.setdefault(last, []).append(storage)
        live: set[int] = set()
        size = 0
        sizes: list[int] = []
        for position in range(problem.forward_steps):
            for storage in deaths.get(position, ()):
                live.discard(storage)
                size -= problem.bytes[storage]
            for storage in births.get(position, ()):
                live.add(storage)
                size += problem.bytes[storage]
            sizes.append(size)
        chosen = _local_minima(sizes[:-1], _POSITIONS)
        return chosen, self._live_sets(chosen, births, deaths)

    def _live_sets(
        self, chosen: list[int], births: dict[int, list[int]], deaths: dict[int, list[int]]
    ) -> list[frozenset[int]]:
        wanted, found, live = set(chosen), [], set[int]()
        for position in range(self.problem.forward_steps):
            live.difference_update(deaths.get(position, ()))
            live.update(births.get(position, ()))
            if position in wanted:
                found.append(frozenset(live))
        return found

    @cached_property
    def _last_use(self) -> dict[int, int]:
        """Last forward position at which each value is needed to go on from there.

        With ``follow_reads``, a value that the backward reads while it still has values born later
        to come to counts as needed up to those: a segment that made it anew would run too early.
        """
        last = dict.fromkeys(self.relevant, -1)
        for operator in self.problem.operators:
            if any(storage in self.relevant for storage in operator.makes):
                for storage in operator.reads:
                    last[storage] = operator.position
        if self.follow_reads:
            for reads, level in zip(self.problem.reads, self.levels, strict=True):
                for storage in reads:
                    last[storage] = max(last[storage], level)
        return last

    @cached_property
    def levels(self) -> list[int]:
        """For each backward step the latest birth among values that it or a later step reads."""
        levels, level = [], 0
        for reads in reversed(self.problem.reads):
            level = max([level, *map(self._birth, reads)])
            levels.append(level)
        return levels[::-1]

    def _birth(self, storage: int) -> int:
        return self.problem.operators[self.problem.maker[storage]].position

    def _measure(self) -> None:
        """By forward position: bytes born before it that the backward reads, and base memory.

        The base is that of the backward steps whose level is the position.
        """
        problem = self.problem
        needed = np.zeros(problem.forward_steps + 1, dtype=np.int64)
        for storage in {s for reads in problem.reads for s in reads}:
            needed[self._birth(storage) + 1] += problem.bytes[storage]
        self.needed = np.cumsum(needed)
        self.base = np.zeros(problem.forward_steps + 1, dtype=np.int64)
        for level, base in zip(self.levels, problem.base, strict=True):
            self.base[level] = max(self.base[level], base)

    def sweep(self) -> Iterator[frozenset[int]]:
        """What to save for targets from a peak that is out of reach to one without recompute."""
        highest = int(self.base.max() + self.needed[-1])
        lowest = int(self.base.max() + self.problem.fixed) // 2
        for target in np.geomspace(max(lowest, 1), max(highest, 1), _TARGETS):
            saved = self.shortest(int(target))
            if saved is not None:
                yield saved

    @cached_property
    def _segments(self) -> tuple[Array, Array, Array]:
        """(bytes the backward needs, base memory, newly saved bytes) by segment [end, start]."""
        ends = [*self.positions, self.problem.forward_steps - 1]
        sets = [*self.across, frozenset[int]()]
        starts = [-1, *self.positions]
        shape = (len(ends), len(starts))
        held, base, new = (np.full(shape, _NEVER, dtype=np.int64) for _ in range(3))
        for q, end in enumerate(ends):
            reach = q + 1
            after = np.asarray(starts[:reach]) + 1
            held[q, :reach] = self.needed[end + 1] - self.needed[after]
            # The base of segment [p, q] is the maximum from its start to its end.
            tail = np.maximum.accumulate(self.base[: end + 1][::-1])[::-1]
            base[q, :reach] = tail[after]
            born = np.zeros(self.problem.forward_steps + 1, dtype=np.int64)
            for storage in sets[q]:
                operator = self.problem.operators[self.problem.maker[storage]]
                born[operator.position] += self.problem.bytes[storage]
            later = np.cumsum(born[::-1])[::-1]
            new[q, :reach] = later[after]
        return held, base, new

    def shortest(self, target: int) -> frozenset[int] | None:
        """The cuts with the fewest saved bytes whose segments all meet ``target`` by estimate."""
        held, base, new = self._segments
        vertices = len(held)
        saved_before = np.full(vertices + 1, _NEVER, dtype=np.int64)
        saved_before[0] = 0
        previous = np.zeros(vertices + 1, dtype=np.int64)
        for q in range(vertices):
            before = saved_before[: q + 1]
            fits = before + held[q, : q + 1] + base[q, : q + 1] <= target
            cost = np.where(fits, before + new[q, : q + 1], _NEVER)
            previous[q + 1] = int(np.argmin(cost))
            saved_before[q + 1] = cost[previous[q + 1]]
        if saved_before[-1] >= _NEVER:
            return None
        saved: set[int] = set()
        vertex = int(previous[-1])
        while vertex > 0:
            saved |= self.across[vertex - 1]
            vertex = int(previous[vertex])
        return frozenset(saved)


def _needed_storages(problem: Problem) -> set[int]:
    """Storages that the backward reads, and all they are made from."""
    needed: set[int] = set()
    stack = [s for reads in problem.reads for s in reads]
    while stack:
        storage = stack.pop()
        if storage not in needed:
            needed.add(storage)
            stack.extend(problem.operators[problem.maker[storage]].reads)
    return needed


def _local_minima(sizes: list[int], limit: int) -> list[int]:
    """Positions where ``sizes`` stops falling, the smallest ``limit`` of them, in order."""
    minima = [
        i
        for i, (here, after) in enumerate(pairwise([*sizes, 1 << 62]))
        if here < after and (i == 0 or here <= sizes[i - 1])
    ]
    return sorted(sorted(minima, key=lambda i: (sizes[i], i))[:limit])


def _upgrade(solver: Solver, schedule: Schedule, budget: int) -> Schedule:
    """Saves more values while every instant stays within ``budget``; never worse."""
    for _ in range(_UPGRADE_ROUNDS):
        extra = _Upgrades(solver, schedule, budget).choose()
        if not extra:
            break
        upgraded = make_schedule(solver.problem, schedule.saved | extra)
        if upgraded.peak > budget or solver.price(upgraded) >= solver.price(schedule):
            break
        schedule = upgraded
    return schedule


class _Upgrades:
    """Greedy choice of values to save, by recompute price spared per byte."""

    def __init__(self, solver: Solver, schedule: Schedule, budget: int) -> None:
        self.problem = problem = solver.problem
        self.price = solver.operator_price
        self.schedule = schedule
        self.forward_room = budget - schedule.forward
        self.backward_room = budget - schedule.backward
        self.running = set(schedule.first_event)
        self.needs: dict[int, int] = {}
        for storage in {s for reads in problem.reads for s in reads}:
            self._add_need(storage)
        for index in self.running:
            for storage in problem.operators[index].reads:
                self._add_need(storage)
        self.chosen: set[int] = set()

    def _add_need(self, storage: int) -> None:
        if self.problem.maker[storage] in self.running and storage not in self.schedule.saved:
            self.needs[storage] = self.needs.get(storage, 0) + 1

    def choose(self) -> set[int]:
        heap = [(-self._worth(s), s) for s in self.needs if s not in self.problem.must_recompute]
        heapq.heapify(heap)
        while heap:
            promised, storage = heapq.heappop(heap)
            if self.needs.get(storage, 0) <= 0 or storage in self.chosen:
                continue
            worth = self._worth(storage)
            if worth <= 0:
                continue
            if heap and worth < -heap[0][0]:
                if -worth > promised:
                    heapq.heappush(heap, (-worth, storage))
                continue
            if self._fits(storage):
                self._take(storage)
        return self.chosen

    def _worth(self, storage: int) -> float:
        spared = sum(self.price[index] for index in self._spared(storage)[0])
        return spared / max(self.problem.bytes[storage], 1)

    def _spared(self, storage: int) -> tuple[list[int], dict[int, int]]:
        """Operators that need not run again if ``storage`` is saved, and needs that fall away."""
        dropped: dict[int, int] = {}
        spared: list[int] = []
        stack = [(storage, True)]
        while stack:
            current, saved = stack.pop()
            if not saved:
                dropped[current] = dropped.get(current, 0) + 1
                if self.needs[current] > dropped[current]:
                    continue
            index = self.problem.maker[current]
            operator = self.problem.operators[index]
            if index not in self.running or index in spared:
                continue
            if any(self._still_needed(s, storage, dropped) for s in operator.makes):
                continue
            spared.append(index)
            stack.extend(
                (s, False) for s in operator.reads if s in self.needs and s not in self.chosen
            )
        return spared, dropped

    def _still_needed(self, storage: int, candidate: int, dropped: dict[int, int]) -> bool:
        if storage == candidate or storage in self.chosen:
            return False
        return self.needs.get(storage, 0) > dropped.get(storage, 0)

    def _interval(self, storage: int) -> tuple[slice, slice]:
        """Forward positions and backward events in which saving adds the storage's bytes."""
        death = self.problem.death[storage]
        event = self.schedule.first_event[self.problem.maker[storage]]
        return slice(death + 1, None), slice(0, event)

    def _fits(self, storage: int) -> bool:
        forward, backward = self._interval(storage)
        size = self.problem.bytes[storage]
        return bool(
            self.forward_room[forward].min(initial=size) >= size
            and self.backward_room[backward].min(initial=size) >= size
        )

    def _take(self, storage: int) -> None:
        spared, dropped = self._spared(storage)
        forward, backward = self._interval(storage)
        self.forward_room[forward] -= self.problem.bytes[storage]
        self.backward_room[backward] -= self.problem.bytes[storage]
        self.chosen.add(storage)
        self.running.difference_update(spared)
        for other, count in dropped.items():
            self.needs[other] -= count
