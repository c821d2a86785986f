"""Where to cut the forward so that the backward recomputes one segment after the other.

Saving everything that is live across a position of the forward splits the backward into segments
that recompute from there.  A shortest path over positions finds, for a target peak, the cuts that
save the fewest bytes; checkpointing per block is one of these choices.  Cuts reach small peaks,
since they bound what a recompute makes early; among the schedules that fit, they are rarely cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxzero.solver.problem import Problem

_TARGETS = 40
_POSITIONS = 400
# Larger than any number of bytes, and small enough that three of them add up.
_NEVER = 1 << 60

Array = NDArray[np.int64]


class CutGraph:
    """Positions of the forward as vertices; an edge is a segment recomputed as one.

    Args:
        follow_reads: whether a value counts as live until the backward's first read of it is due,
            and not only until the forward's last read.  Better where early values are read early in
            the backward (auxiliary losses, skips), worse where that ties up large values.
    """

    def __init__(self, problem: Problem, follow_reads: bool) -> None:
        self.problem = problem
        self.follow_reads = follow_reads
        self.relevant = frozenset(problem.needed)
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


def _local_minima(sizes: list[int], limit: int) -> list[int]:
    """Positions where ``sizes`` stops falling, the smallest ``limit`` of them, in order."""
    minima = [
        i
        for i, (here, after) in enumerate(pairwise([*sizes, 1 << 62]))
        if here < after and (i == 0 or here <= sizes[i - 1])
    ]
    return sorted(sorted(minima, key=lambda i: (sizes[i], i))[:limit])
