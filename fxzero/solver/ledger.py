"""A schedule that changes by a few operators at a time, with its bytes at every instant.

Evaluating a schedule looks at all of it; this looks at what a change touches.  An instant is one
number, which orders instants as they come and stays the same when others come between:

    0   the loss      step * width + 1 + operator   one that runs again before the step
                      step * width + width - 1      the step itself

Each value has the instants that make it anew and those that read it; it stays from one of the
former (or from the forward) to the last of the latter before the next.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fxzero.solver.problem import Problem
from fxzero.solver.schedule import Bytes, Schedule, evaluate

_LOSS = 0
_FORWARD = -1  # where a wait starts whose value the forward saved
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Gap:
    """A value that may be away until the instant ``until``, which reads it next."""

    storage: int
    bytes: int
    until: int


class Ledger:
    """What runs when and which bytes are there, under insertions of operators.

    Args:
        schedule: what it begins with.
    """

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.problem = problem
        self.width = len(problem.operators) + 2
        self.again = set(schedule.recompute)
        steps = np.arange(len(problem.reads), dtype=np.int64)
        left = np.asarray([problem.base_before, *problem.base_after], dtype=np.int64)
        self._left = left[: len(steps)]
        self._instants = np.append(_LOSS, steps * self.width + self.width - 1)
        self._base = np.append(problem.base_loss, np.asarray(problem.base, dtype=np.int64))
        self._comes, self._goes = (np.zeros(len(self._instants), dtype=np.int64) for _ in range(2))
        self._comes[0] = problem.held_bytes
        self._forward = problem.forward_change.copy()
        self._made: dict[int, list[int]] = {}
        self._read: dict[int, list[int]] = {}
        self._last_run: dict[int, int] = {}
        self._waits = _Waits()
        for step, reads in problem.reading_steps:
            for storage in reads:
                self._read.setdefault(storage, []).append((step + 1) * self.width - 1)
        again = {s for i, _ in schedule.recompute for s in self._touched(i)}
        for storage in self._read.keys() - again:
            self._enter(storage)
        self._insert(schedule.recompute)
        for storage in again:
            self._enter(storage)

    @property
    def forward(self) -> Bytes:
        """Bytes at each forward position."""
        return self.problem.fixed + np.cumsum(self._forward[:-1])

    @property
    def backward(self) -> Bytes:
        """Bytes at each instant of the backward, in order."""
        return self._base + np.cumsum(self._comes) - np.cumsum(self._goes) + self._goes

    def step_of(self, instant: int) -> int:
        """The backward step that an instant belongs to."""
        return instant // self.width

    def schedule(self) -> Schedule:
        """What the ledger has come to, evaluated as a whole."""
        return evaluate(self.problem, sorted(self.again, key=lambda run: (run[1], run[0])))

    def gaps(self) -> tuple[int, list[Gap]]:
        """The peak's bytes, and what may be away at its instant."""
        forward, backward = self.forward, self.backward
        if forward.max(initial=0) > backward.max(initial=0):
            position = int(np.argmax(forward))
            return int(forward[position]), list(self._saved_across(position))
        at = int(np.argmax(backward))
        return int(backward[at]), list(self._unread_across(int(self._instants[at])))

    def is_there(self, storage: int, instant: int) -> bool:
        """Whether a value is there at an instant for itself or for later."""
        if storage in self.problem.held:
            return True
        made, read = self._made.get(storage, ()), self._read.get(storage, ())
        at = bisect_right(made, instant)
        if at and made[at - 1] == instant:
            return True
        following = made[at] if at < len(made) else _NEVER
        later = bisect_left(read, instant)
        return later < len(read) and read[later] < following

    def run_again(self, chain: Iterable[int], step: int) -> None:
        """Runs operators once more, in their order, before a step of the backward."""
        runs = [(index, step) for index in chain]
        touched = {s for index, _ in runs for s in self._touched(index)}
        for storage in touched:
            self._withdraw(storage)
        self.again.update(runs)
        self._insert(runs)
        for storage in touched:
            self._enter(storage)

    def _touched(self, index: int) -> tuple[int, ...]:
        return *self.problem.operators[index].reads, *self.problem.operators[index].makes

    def _insert(self, runs: Sequence[tuple[int, int]]) -> None:
        runs = sorted(runs, key=lambda run: (run[1], run[0]))
        instants = [step * self.width + 1 + index for index, step in runs]
        at = np.searchsorted(self._instants, instants)
        self._instants = np.insert(self._instants, at, instants)
        self._base = np.insert(self._base, at, self._left[[step for _, step in runs]])
        self._comes = np.insert(self._comes, at, 0)
        self._goes = np.insert(self._goes, at, 0)
        for (index, _), instant in zip(runs, instants, strict=True):
            operator = self.problem.operators[index]
            for storage in operator.reads:
                insort(self._read.setdefault(storage, []), instant)
            for storage in operator.makes:
                insort(self._made.setdefault(storage, []), instant)
            if operator.state_bytes:
                self._keep_state(index, instant)

    def _keep_state(self, index: int, instant: int) -> None:
        """What an operator needs besides its inputs is saved up to the last time it runs."""
        operator, before = self.problem.operators[index], self._last_run.get(index)
        if before is None:
            self._comes[0] += operator.state_bytes
            self._forward[operator.position] += operator.state_bytes
        elif before < instant:
            self._goes[self._at(before)] -= operator.state_bytes
        if before is None or before < instant:
            self._goes[self._at(instant)] += operator.state_bytes
            self._last_run[index] = instant

    def _at(self, instant: int) -> int:
        return int(self._instants.searchsorted(instant))

    def _stays(self, storage: int) -> Iterator[tuple[int, list[int]]]:
        """Where each instance of a value begins, and the instants that read it."""
        made, read = self._made.get(storage, []), self._read.get(storage, [])
        ends = [bisect_left(read, start) for start in made]
        first = ends[0] if ends else len(read)
        if first:
            yield _FORWARD, read[:first]
        for start, (begin, end) in zip(made, pairwise([*ends, len(read)]), strict=True):
            yield start, read[begin:end]

    def _enter(self, storage: int) -> None:
        self._count(storage, self.problem.bytes[storage])
        if storage not in self.problem.held and self.problem.bytes[storage]:
            self._waits.enter(storage, self._waiting(storage))

    def _withdraw(self, storage: int) -> None:
        self._count(storage, -self.problem.bytes[storage])
        self._waits.withdraw(storage)

    def _count(self, storage: int, size: int) -> None:
        """Adds bytes wherever the value is there."""
        problem = self.problem
        for start, reads in self._stays(storage):
            if start == _FORWARD:
                if storage not in problem.outputs:
                    self._forward[problem.death[storage] + 1] += size
                if storage in problem.held:
                    continue  # counted from beginning to end
            self._comes[self._at(max(start, _LOSS))] += size
            self._goes[self._at(reads[-1] if reads else start)] += size

    def _waiting(self, storage: int) -> Iterator[tuple[int, int, int]]:
        """(first instant of its instance, instant before, read that it waits for) of a value."""
        for start, reads in self._stays(storage):
            if start == _FORWARD and storage in self.problem.must_save:
                continue
            opened = reads[0] if start == _FORWARD else start
            for before, read in zip((start, *reads), reads, strict=False):
                yield opened, before, read

    def _saved_across(self, position: int) -> Iterator[Gap]:
        """Saved values that are dead in the forward at a position, up to their first read."""
        for storage, until in self._waits.across(_FORWARD, from_forward=True):
            if storage not in self.problem.outputs and self.problem.death[storage] < position:
                yield Gap(storage, self.problem.bytes[storage], until)

    def _unread_across(self, instant: int) -> Iterator[Gap]:
        """Values that are there at an instant for later steps only, up to their next read."""
        for storage, until in self._waits.across(instant):
            if self.step_of(until) > self.step_of(instant):
                yield Gap(storage, self.problem.bytes[storage], until)


class _Waits:
    """Intervals in which a value is there and not read, in one table."""

    def __init__(self) -> None:
        self.table = np.zeros((4, 1024), dtype=np.int64)  # storage, opened, before, until
        self.rows: dict[int, range] = {}
        self.used = 0

    def enter(self, storage: int, waits: Iterable[tuple[int, int, int]]) -> None:
        found = [(storage, *wait) for wait in waits]
        if not found:
            return
        if self.used + len(found) > self.table.shape[1]:
            self._make_room(len(found))
        self.rows[storage] = range(self.used, self.used + len(found))
        self.table[:, self.used : self.used + len(found)] = np.asarray(found, dtype=np.int64).T
        self.used += len(found)

    def withdraw(self, storage: int) -> None:
        rows = self.rows.pop(storage, range(0))
        self.table[3, rows.start : rows.stop] = _FORWARD  # across nothing

    def across(self, instant: int, *, from_forward: bool = False) -> list[tuple[int, int]]:
        """(storage, the read it waits for) at an instant, those first that came first."""
        storages, opened, before, until = self.table[:, : self.used]
        there = (before == _FORWARD) if from_forward else (before < instant)
        found = np.flatnonzero(there & (until > instant))
        found = found[np.lexsort((storages[found], opened[found]))]
        return list(zip(storages[found].tolist(), until[found].tolist(), strict=True))

    def _make_room(self, more: int) -> None:
        """Leaves out what was withdrawn, and doubles the table if it is half full all the same."""
        kept = [row for rows in self.rows.values() for row in rows]
        table = self.table[:, kept]
        size = self.table.shape[1]
        while 2 * (len(kept) + more) > size:
            size *= 2
        self.table = np.zeros((4, size), dtype=np.int64)
        self.table[:, : len(kept)] = table
        self.used = 0
        for storage, rows in self.rows.items():
            self.rows[storage] = range(self.used, self.used + len(rows))
            self.used += len(rows)
