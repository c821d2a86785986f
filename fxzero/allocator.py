"""What a caching allocator keeps of a device's memory while a step needs less of it.

torch's allocator for CUDA gives each stream memory of its own, puts what is asked for into the
smallest free piece that holds it, merges pieces that become free side by side, and gives nothing
back.  What it has taken ("reserved") is what a device must have; what is alive is less:

    | logits | their float |   loss   |             logits and their float are freed
    | gradient ...|  free  |   loss   | gradient |  which has room for one of two gradients

Here a pool is one piece of addresses that grows at its end, as with expandable segments; all sizes
are rounded up to pages, and what is smaller than a page is left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence

from fxzero.timeline import Alive

_PAGE = 2 * 2**20
_SMALL = 2**20


class Pool:
    """Addresses of one stream, in pages."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []  # (size, start)
        self._sizes: dict[int, int] = {}  # by start
        self._starts: dict[int, int] = {}  # by end

    def take(self, size: int) -> int:
        """Where ``size`` pages are from now on: in the smallest free piece that has them."""
        at = bisect_left(self._free, (size, 0))
        if at < len(self._free):
            found, start = self._free[at]
            self._remove(start, found)
            if found > size:
                self._add(start + size, found - size)
            return start
        start = self._starts.get(self.end, self.end)
        if start < self.end:  # a free piece at the end grows
            self._remove(start, self.end - start)
        self.end = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """Frees pages."""
        if (before := self._starts.get(start)) is not None:
            self._remove(before, start - before)
            start, size = before, size + start - before
        if (after := self._sizes.get(start + size)) is not None:
            self._remove(start + size, after)
            size += after
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._sizes[start], self._starts[start + size] = size, start

    def _remove(self, start: int, size: int) -> None:
        self._free.pop(bisect_left(self._free, (size, start)))
        del self._sizes[start], self._starts[start + size]


def reserved_bytes(
    allocations: Sequence[Alive],
    pool_of: Callable[[Alive], str] = lambda entry: "",
    *,
    steps: int = 2,
) -> dict[str, int]:
    """What the allocator has taken after some steps, by pool.

    Args:
        allocations: of one step (``Timeline.allocations``).  Those that were there before it stay
            for all steps; those that it leaves behind, its gradients, are freed before the next.
        pool_of: which stream asks for a storage.
        steps: what one leaves is in the way of the next, so that two may need more than one.
    """
    pools: dict[str, Pool] = defaultdict(Pool)
    born: dict[int, list[int]] = defaultdict(list)
    dead: dict[int, list[int]] = defaultdict(list)
    left = []
    for number, entry in enumerate(allocations):
        if entry.bytes < _SMALL:
            continue
        if entry.fixed:
            pools[pool_of(entry)].take(_pages(entry))
            continue
        born[entry.first].append(number)
        if entry.last is None:
            left.append(number)
        else:
            dead[entry.last].append(number)
    for _ in range(steps):
        places: dict[int, int] = {}

        def free(number: int, places: dict[int, int] = places) -> None:
            entry = allocations[number]
            pools[pool_of(entry)].give(places.pop(number), _pages(entry))

        for point in sorted({*born, *dead}):
            for number in born[point]:
                entry = allocations[number]
                places[number] = pools[pool_of(entry)].take(_pages(entry))
            for number in dead[point]:
                free(number)
        for number in left:
            free(number)
    return {name: pool.end * _PAGE for name, pool in pools.items()}


def _pages(entry: Alive) -> int:
    return -(-entry.bytes // _PAGE)
