"""What the program of single recompute takes as given: the bytes that no decision changes.

An open frame leaves every value free.  A frame around a schedule keeps what the schedule saves and
asks what else to save: that makes nothing earlier and nothing longer, so the schedule's own bytes
plus what is saved besides, up to where it used to be recomputed, are never too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fxzero.solver.problem import Problem
from fxzero.solver.schedule import Bytes, Schedule, make_schedule, save_more


@dataclass(frozen=True)
class Frame:
    """What a program takes as given.

    Attributes:
        settled: values that are there whatever is decided.
        first: the first backward step that reads each value.
        until: the last step at which a value takes memory only because it was saved.
        steps: bytes at each backward step that no decision changes.
        loss: the same while a loss outside the model is computed.
        forward: the same at each forward position.
        states: whether generator states that recompute needs come on top.
        runs: how often an operator runs again, if it does; once if it is not named.  With a fetch
            among them its value is made by the operators that are named, and no others.
        around: the schedule that the frame is built around, if any.
    """

    settled: frozenset[int]
    first: dict[int, int]
    until: dict[int, int]
    steps: Bytes
    loss: int
    forward: Bytes
    states: bool
    runs: Mapping[int, int] = field(default_factory=dict)
    around: Schedule | None = None

    def made(self, problem: Problem, value: int) -> list[tuple[int, ...]]:
        """Groups of operators; of each group one has to make the value, if it is not saved."""
        ways = problem.ways(value)
        if self.around is None or len(ways) == 1:
            return [ways]
        return [(way,) for way in ways if way in self.runs] or [ways[:1]]

    def schedule(
        self, problem: Problem, saved: Collection[int], fetched: Collection[int]
    ) -> Schedule:
        """What becomes of the decision to save these values, and to fetch those."""
        if self.around is None:
            return make_schedule(problem, problem.must_save.union(saved), fetched)
        return save_more(problem, self.around, self.settled.union(saved) - self.around.saved)


def open_frame(problem: Problem) -> Frame:
    """Anything may be saved or not."""
    first, last = problem.first_read, problem.last_read
    change = np.zeros(len(problem.reads) + 1, dtype=np.int64)
    for value in first.keys() - problem.held:
        change[first[value]] += problem.bytes[value]
        change[last[value] + 1] -= problem.bytes[value]
    return Frame(
        settled=problem.held,
        first=first,
        until=_until(problem, first),
        steps=np.asarray(problem.base, dtype=np.int64)
        + np.cumsum(change)[:-1]
        + problem.held_bytes,
        loss=problem.base_loss + problem.held_bytes,
        forward=problem.forward_bytes,
        states=True,
    )


def frame_around(problem: Problem, schedule: Schedule) -> Frame:
    """What the schedule saves stays saved, and more may be."""
    until = dict.fromkeys(problem.needed, -1)
    for index, step in schedule.recompute:
        # Within its step a recomputed value may come late, where a saved one is there throughout.
        until.update(dict.fromkeys(problem.operators[index].makes, step))
    return Frame(
        settled=schedule.saved | problem.held,
        first=problem.first_read,
        until=until,
        steps=step_tops(schedule),
        loss=int(schedule.backward[0]),
        forward=schedule.forward,
        states=False,
        runs=Counter(index for index, _ in schedule.recompute),
        around=schedule,
    )


def _until(problem: Problem, first: dict[int, int]) -> dict[int, int]:
    """The last step at which a value is there only because it was saved.

    The one before its first read; for a value that only recompute reads, before the last first
    read of what is made from it.
    """
    readers: dict[int, list[int]] = {}
    for index in problem.makers:
        for value in problem.operators[index].reads:
            readers.setdefault(value, []).append(index)
    until = {value: step - 1 for value, step in first.items()}
    for value in reversed(problem.needed):
        if value not in until:
            made = (o for q in readers.get(value, ()) for o in problem.operators[q].makes)
            until[value] = max((until[o] for o in made if o in until), default=-1)
    return until


def step_tops(schedule: Schedule) -> Bytes:
    """The most bytes at each backward step, what is recomputed right before it included."""
    starts = [0, *(event + 1 for event in schedule.step_events[:-1])]
    return np.maximum.reduceat(schedule.backward, starts)


def fullest_steps(schedule: Schedule, count: int) -> list[int]:
    """The backward steps with the most bytes: first the fullest, none beside a fuller one."""
    tops = np.pad(step_tops(schedule), 1, constant_values=-1)
    peaks = (tops[1:-1] >= tops[:-2]) & (tops[1:-1] > tops[2:])
    found = np.flatnonzero(peaks)
    return [int(step) for step in found[np.argsort(-tops[1:-1][found], kind="stable")][:count]]
