"""What runs again where, and that schedule's bytes at every instant.

A recomputed value lives from its making to the last read before it is made anew; a value that the
backward reads without any recompute before is one that the forward saves.  A value that is fetched
from host memory is one that an operator without inputs makes.

    recompute [(f, 7), (g, 7)]; step 7 reads x3      before step 7: x2 = f(x1), x3 = g(x2)
                                                     x1 is saved, x2 dies at once
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxzero.solver.problem import Problem

Bytes = NDArray[np.int64]


class Life(NamedTuple):
    """One instance of a value in backward events.

    Attributes:
        start: the event that makes it; 0 for one that the forward saved.
        reads: the events that read it, in order.
    """

    storage: int
    start: int
    reads: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.reads[-1] if self.reads else self.start


@dataclass(frozen=True)
class Schedule:
    """What runs when, and what it costs.

    Attributes:
        saved: storages carried from the forward to the backward because they are needed there.
        recompute: (operator, backward step it runs before), in execution order.
        forward: bytes at each forward position.
        backward: bytes at each backward event, recomputed operators included; the first event is a
            loss outside the model.
        step_events: the event of each backward step.
        lives: the instances of values in the backward, but for outputs that the caller keeps.
        seconds, flops: total price of the recompute and of copies to and from the host.
        peak: the largest of all bytes.
    """

    saved: frozenset[int]
    recompute: tuple[tuple[int, int], ...]
    forward: Bytes
    backward: Bytes
    step_events: tuple[int, ...]
    lives: tuple[Life, ...]
    seconds: float
    flops: int
    peak: int

    @cached_property
    def steps(self) -> Bytes:
        """The backward step that each event belongs to."""
        ends = np.asarray(self.step_events, dtype=np.int64) + 1
        return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))


def make_schedule(
    problem: Problem, saved: Collection[int], fetched: Collection[int] = ()
) -> Schedule:
    """The schedule that keeps ``saved`` (and what nothing can make again), each recompute once.

    What is not saved is computed again, or fetched if it is in ``fetched``, as late as possible,
    right before the first step that reads it, and then kept to its last use.
    """
    return evaluate(problem, _once_when_needed(problem, frozenset(saved), frozenset(fetched)))


def save_more(problem: Problem, schedule: Schedule, saved: Collection[int]) -> Schedule:
    """The schedule that saves these values too, less the recomputes that are not needed then."""
    there = problem.held.union(saved)
    pending = list(schedule.recompute)
    needed: list[tuple[int, int]] = []
    wanted: set[int] = set()
    for step in reversed(range(len(problem.reads))):
        wanted.update(problem.reads[step])
        while pending and pending[-1][1] == step:
            index, _ = pending.pop()
            operator = problem.operators[index]
            if not there.issuperset(wanted.intersection(operator.makes)):
                needed.append((index, step))
                wanted.difference_update(operator.makes)
                wanted.update(operator.reads)
    return evaluate(problem, needed[::-1])


def evaluate(problem: Problem, recompute: Sequence[tuple[int, int]]) -> Schedule:
    """The schedule that runs just these operators again; (operator, step) pairs in order."""
    return _Books(problem, recompute).close()


def _once_when_needed(
    problem: Problem, saved: frozenset[int], fetched: frozenset[int]
) -> list[tuple[int, int]]:
    operators, maker = problem.operators, problem.maker
    present = set(saved) | set(problem.held)
    order: list[tuple[int, int]] = []
    for step, reads in enumerate(problem.reads):
        again: set[int] = set()
        stack = [s for s in reads if s not in present]
        while stack:  # a loop, for chains may be thousands deep
            storage = stack.pop()
            index = problem.fetch[storage] if storage in fetched else maker[storage]
            if not operators[index].recomputable:
                present.add(storage)
            elif index not in again:
                again.add(index)
                stack.extend(s for s in operators[index].reads if s not in present)
        for index in sorted(again):
            if operators[index].fetches and maker[operators[index].makes[0]] in again:
                continue  # its maker runs again for another of its results
            order.append((index, step))
            present.update(operators[index].makes)
    return order


def _integers(values: list[int]) -> Bytes:
    return np.asarray(values, dtype=np.int64)


class _Books:
    def __init__(self, problem: Problem, recompute: Sequence[tuple[int, int]]) -> None:
        self.problem = problem
        self.recompute = tuple(recompute)
        self.last_event: dict[int, int] = {}
        self.opened: list[tuple[int, int, list[int]]] = []  # storage, start, reads
        self.current: dict[int, list[int]] = {}
        self.saved: set[int] = set()

    def close(self) -> Schedule:
        problem = self.problem
        due, runs = self.recompute, 0
        for step, reads in (*problem.reading_steps, (len(problem.reads), ())):
            while runs < len(due) and due[runs][1] <= step:
                runs += 1
                self._run_again(due[runs - 1][0], due[runs - 1][1] + runs)
            self._read(reads, step + 1 + runs)
        lives = [Life(storage, start, tuple(reads)) for storage, start, reads in self.opened]
        ends = self._step_events()
        forward, backward = self._forward_bytes(), self._backward_bytes(lives, ends)
        operators = [problem.operators[index] for index, _ in self.recompute]
        return Schedule(
            saved=frozenset(self.saved),
            recompute=self.recompute,
            forward=forward,
            backward=backward,
            step_events=tuple(ends.tolist()),
            lives=tuple(life for life in lives if life.storage not in problem.held),
            seconds=float(sum(operator.seconds for operator in operators)),
            flops=sum(operator.flops for operator in operators),
            peak=int(max(forward.max(initial=0), backward.max(initial=0))),
        )

    def _step_events(self) -> Bytes:
        """The event of each step: behind the first one, earlier steps, and all that ran again."""
        steps = np.arange(len(self.problem.reads), dtype=np.int64)
        before = _integers([step for _, step in self.recompute])
        assert np.all(np.diff(before, append=len(steps) - 1) >= 0), "recompute is out of order"
        return steps + 1 + np.searchsorted(before, steps, side="right")

    def _read(self, storages: Sequence[int], event: int) -> None:
        for storage in storages:
            reads = self.current.get(storage)
            if reads is None:
                self.saved.add(storage)
                reads = self._open(storage, start=0)
            reads.append(event)

    def _open(self, storage: int, start: int) -> list[int]:
        reads: list[int] = []
        self.current[storage] = reads
        self.opened.append((storage, start, reads))
        return reads

    def _run_again(self, index: int, event: int) -> None:
        operator = self.problem.operators[index]
        self._read(operator.reads, event)
        for storage in operator.makes:
            self._open(storage, start=event)
        self.last_event[index] = event

    def _forward_bytes(self) -> Bytes:
        problem = self.problem
        change = np.zeros(problem.forward_steps + 1, dtype=np.int64)
        change += problem.forward_change
        for storage in self.saved - problem.outputs:
            change[problem.death[storage] + 1] += problem.bytes[storage]
        for index in self.last_event:
            change[problem.operators[index].position] += problem.operators[index].state_bytes
        return problem.fixed + np.cumsum(change[:-1])

    def _backward_bytes(self, lives: Sequence[Life], ends: Bytes) -> Bytes:
        problem = self.problem
        events = 1 + len(problem.reads) + len(self.recompute)
        change = np.zeros(events + 1, dtype=np.int64)
        # What the caller holds lives to the end, whether or not the backward reads it.
        change[0] = problem.held_bytes
        counted = [life for life in lives if life.start > 0 or life.storage not in problem.held]
        sizes = _integers([problem.bytes[life.storage] for life in counted])
        np.add.at(change, _integers([life.start for life in counted]), sizes)
        np.subtract.at(change, _integers([life.end for life in counted]) + 1, sizes)
        for index, event in self.last_event.items():
            change[0] += problem.operators[index].state_bytes
            change[event + 1] -= problem.operators[index].state_bytes
        return self._base_by_event(ends) + np.cumsum(change[:-1])

    def _base_by_event(self, ends: Bytes) -> Bytes:
        """Base memory at every event; while a value is computed again, what the last step left."""
        problem = self.problem
        left = np.asarray([problem.base_before, *problem.base_after[:-1]], dtype=np.int64)
        result = np.repeat(left[: len(ends)], np.diff(ends, prepend=-1))
        result[ends] = problem.base
        result[0] = problem.base_loss
        return result
