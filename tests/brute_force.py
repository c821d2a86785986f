"""The cheapest schedule of a tiny problem, by trying all of them.

Knows the problem's definition and none of the solver's code.  A state is what is carried from one
backward step to the next: a set of values and a set of generator states.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

from fxzero.solver.problem import Problem

Set = frozenset[int]


def cheapest(problem: Problem, budget: int) -> float | None:
    """The least seconds of recompute within ``budget`` bytes; None if nothing fits."""
    everything = _BruteForce(problem, budget)
    prices = [everything.price_from(0, values, states) for values, states in everything.starts()]
    found = [price for price in prices if price is not None]
    return min(found, default=None)


class _BruteForce:
    def __init__(self, problem: Problem, budget: int) -> None:
        self.p = problem
        self.budget = budget
        self.held_bytes = sum(problem.bytes[v] for v in problem.held)
        needed = [v for v in problem.needed if v not in problem.held]
        self.values = needed
        makers = {way for v in problem.needed for way in problem.ways(v)}
        self.operators = sorted(q for q in makers if problem.operators[q].recomputable)
        self.price_from = functools.cache(self._price_from)

    def starts(self) -> Iterator[tuple[Set, Set]]:
        p = self.p
        free = [v for v in self.values if v not in p.must_recompute - p.must_save]
        free += [v for v in self.values if not p.operators[p.maker[v]].recomputable]
        stateful = [q for q in self.operators if p.operators[q].state_bytes]
        for saved in _subsets(dict.fromkeys(free)):
            for states in _subsets(stateful):
                if self._forward_fits(saved, states):
                    yield saved, states

    def _forward_fits(self, saved: Set, states: Set) -> bool:
        p = self.p
        alive: set[int] = set()
        for index, operator in enumerate(p.operators):
            if operator.fetches:
                continue
            position = operator.position
            alive |= set(operator.makes)
            size = p.fixed + sum(p.bytes[s] for s in alive)
            size += sum(p.operators[q].state_bytes for q in states if q <= index)
            if size > self.budget:
                return False
            alive = {s for s in alive if s in saved or s in p.outputs or p.death[s] > position}
        return p.base_loss + self._size(saved, states) <= self.budget

    def _size(self, values: Set | set[int], states: Set) -> int:
        p = self.p
        size = self.held_bytes + sum(p.bytes[v] for v in values)
        return size + sum(p.operators[q].state_bytes for q in states)

    def _price_from(self, step: int, values: Set, states: Set) -> float | None:
        """The least price from the beginning of ``step`` with ``values`` present."""
        p = self.p
        if step == len(p.reads):
            return 0.0
        best: float | None = None
        for again in _subsets(self.operators):
            price = sum(p.operators[q].seconds for q in again)
            if best is not None and price >= best:
                continue
            if any(p.operators[q].state_bytes and q not in states for q in again):
                continue
            made = {v for q in again for v in p.operators[q].makes}
            if made & values or not self._reads_found(step, again, values | made):
                continue
            present = [v for v in self.values if v in values or v in made]
            for carried in _subsets(present):
                for kept in _subsets(sorted(states)):
                    if not self._step_fits(step, again, values, states, carried, kept):
                        continue
                    rest = self.price_from(step + 1, carried, kept)
                    if rest is not None and (best is None or price + rest < best):
                        best = price + rest
        return best

    def _reads_found(self, step: int, again: Set, present: Set | set[int]) -> bool:
        p = self.p
        there = present | p.held
        reads = set(p.reads[step]).union(*(p.operators[q].reads for q in again))
        return reads <= there

    def _step_fits(
        self, step: int, again: Set, values: Set, states: Set, carried: Set, kept: Set
    ) -> bool:
        p = self.p
        order = sorted(again)
        left = p.base_after[step - 1] if step else p.base_before
        later: set[int] = set(carried) | set(p.reads[step])
        # From the last moment backwards: what is still needed then.
        moments: list[tuple[int, set[int], set[int]]] = [(p.base[step], set(later), set(kept))]
        running = set(kept)
        for q in reversed(order):
            running |= {q} & states
            alive = (later - _made_from(p, order, q)) | set(p.operators[q].makes)
            alive |= set(p.operators[q].reads)
            moments.append((left, alive, set(running)))
            later = (later - set(p.operators[q].makes)) | set(p.operators[q].reads)
        # A state or value that is not used again was not worth carrying here.
        if not running >= states or not set(values) <= later:
            return False
        for base, alive, pending in moments:
            inside = {v for v in alive if v not in p.held}
            if base + self._size(inside, frozenset(pending)) > self.budget:
                return False
        return True


def _made_from(p: Problem, order: list[int], q: int) -> set[int]:
    """Values that operators after ``q`` make."""
    return {v for other in order if other > q for v in p.operators[other].makes}


def _subsets(items: Iterable[int]) -> Iterator[Set]:
    pool = list(items)
    for count in range(len(pool) + 1):
        yield from map(frozenset, itertools.combinations(pool, count))
