"""From saved values to the schedule they imply, and that schedule's bytes at every instant.

What is not saved is computed again as late as possible: right before the first backward step
that reads it, together with whatever it is made from.  A recomputed value lives from there to
its last use.

    saved {x1}; step 7 reads x3        before step 7: x2 = f(x1), x3 = g(x2)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxzero.problem import Problem

Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """What runs when, and what it costs.

    Attributes:
        saved: storages carried from the forward to the backward because they are needed there.
        recompute: (operator, backward step it runs before), in execution order.
        forward: bytes at each forward position.
        backward: bytes at each backward event, recomputed operators included; the first event is a
            loss outside the model.
        first_event: for each recomputed operator, the backward event at which it runs.
        seconds, flops: total price of the recompute.
        peak: the largest of all bytes.
    """

    saved: frozenset[int]
    recompute: tuple[tuple[int, int], ...]
    forward: Bytes
    backward: Bytes
    first_event: dict[int, int]
    seconds: float
    flops: int
    peak: int


def make_schedule(problem: Problem, saved: Collection[int]) -> Schedule:
    """The schedule in which exactly ``saved`` is kept (and what nothing can make again)."""
    return _Scheduler(problem, saved).run()


class _Scheduler:
    def __init__(self, problem: Problem, saved: Collection[int]) -> None:
        self.problem = problem
        self.wanted = frozenset(saved)
        self.event = 1
        self.step_events: list[int] = []
        self.recompute: list[tuple[int, int]] = []
        self.first_event: dict[int, int] = {}
        self.kept: set[int] = set()
        self.spans: list[_Span] = []
        self.current: dict[int, _Span] = {}
        for storage in problem.held:
            self._open(storage, start=0)

    def run(self) -> Schedule:
        problem = self.problem
        for step, reads in enumerate(problem.reads):
            for storage in reads:
                self._need(storage, step)
            for storage in reads:
                self.current[storage].end = self.event
            self.step_events.append(self.event)
            self.event += 1
        for span in self.spans:
            if span.storage in problem.held and span.start == 0:
                span.end = self.event - 1
        operators = [problem.operators[index] for index, _ in self.recompute]
        forward, backward = self._forward_bytes(), self._backward_bytes()
        return Schedule(
            saved=frozenset(self.kept),
            recompute=tuple(self.recompute),
            forward=forward,
            backward=backward,
            first_event=self.first_event,
            seconds=sum(operator.seconds for operator in operators),
            flops=sum(operator.flops for operator in operators),
            peak=int(max(forward.max(initial=0), backward.max(initial=0))),
        )

    def _open(self, storage: int, start: int) -> None:
        span = self.current[storage] = _Span(storage, start, start)
        self.spans.append(span)

    def _has(self, storage: int) -> bool:
        """Whether the value is there now: computed again, held by the caller, or saved."""
        if storage in self.current:
            if self.current[storage].start == 0:
                self.kept.add(storage)
            return True
        operator = self.problem.operators[self.problem.maker[storage]]
        if storage in self.wanted or not operator.recomputable:
            self.kept.add(storage)
            self._open(storage, start=0)
            return True
        return False

    def _need(self, storage: int, step: int) -> None:
        """Makes a value available before ``step``; a loop, for chains may be thousands deep."""
        if self._has(storage):
            return
        again: set[int] = set()
        stack = [self.problem.maker[storage]]
        while stack:
            index = stack.pop()
            if index not in again:
                again.add(index)
                reads = self.problem.operators[index].reads
                stack.extend(self.problem.maker[s] for s in reads if not self._has(s))
        for index in sorted(again):
            self._run_again(index, step)

    def _run_again(self, index: int, step: int) -> None:
        operator = self.problem.operators[index]
        for storage in operator.reads:
            self.current[storage].end = self.event
        for storage in operator.makes:
            self._open(storage, start=self.event)
        self.recompute.append((index, step))
        self.first_event[index] = self.event
        self.event += 1

    def _forward_bytes(self) -> Bytes:
        problem = self.problem
        change = np.zeros(problem.forward_steps + 1, dtype=np.int64)
        for operator in problem.operators:
            for storage in operator.makes:
                change[operator.position] += problem.bytes[storage]
                if storage not in self.kept and storage not in problem.outputs:
                    change[problem.death[storage] + 1] -= problem.bytes[storage]
        for index in self.first_event:
            change[problem.operators[index].position] += problem.operators[index].state_bytes
        return problem.fixed + np.cumsum(change[:-1])

    def _backward_bytes(self) -> Bytes:
        problem = self.problem
        change = np.zeros(self.event + 1, dtype=np.int64)
        for span in self.spans:
            change[span.start] += problem.bytes[span.storage]
            change[span.end + 1] -= problem.bytes[span.storage]
        for index, event in self.first_event.items():
            change[0] += problem.operators[index].state_bytes
            change[event + 1] -= problem.operators[index].state_bytes
        return self._base_by_event() + np.cumsum(change[:-1])

    def _base_by_event(self) -> Bytes:
        """Base memory at every event; while a value is computed again, what the last step left."""
        problem = self.problem
        result = np.empty(self.event, dtype=np.int64)
        result[0] = problem.base_loss
        start, left = 1, problem.base_before
        for step, at in enumerate(self.step_events):
            result[start:at] = left
            result[at] = problem.base[step]
            start, left = at + 1, problem.base_after[step]
        return result


@dataclass
class _Span:
    """Life of one instance of a value in backward events; start 0 means saved by the forward."""

    storage: int
    start: int
    end: int
