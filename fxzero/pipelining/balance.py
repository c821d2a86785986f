"""Cuts a row of units into pipeline stages so that a step takes the least time.

A step of M micro-batches takes about (M - 1) times its slowest stage and once each of all stages.
24 layers of 3 seconds and a head of 15, in 4 stages with 16 micro-batches:

    layers 6 6 6 6+head    stages 18 18 18 33    15 * 33 + 87 = 582 seconds
    layers 5 8 8 3+head    stages 15 24 24 24    15 * 24 + 87 = 447 seconds, the least

A dynamic program over suffixes of the row, whose states hold Pareto sets, finds the least exactly:

    best[0][N] = {(0, 0)}
    best[k][i] = Pareto set over j > i and (slowest, total) in best[k - 1][j] of
                 (max(t, slowest), t + total),  t = seconds(i, j, in_flight(k))
    answer     = the least of (M - 1) * slowest + total in best[S][0]

Whether a stage fits, and what it recomputes, depends on how many micro-batches it holds, which is
the larger the more stages follow: under 1F1B, the k-th stage from the end holds min(M, k).  In
suffixes, stages are counted from the end, so this number is known wherever the row is cut.

A first run that keeps one element of each set, the one of least ``slowest``, finds the most even
partition.  It bounds the sets of the second run: no slowest stage takes less than its, so all count
from there, and a suffix that takes longer than it, with the least that can precede, is dropped.
For the k best partitions, sets keep what fewer than k others dominate.

PipeDream (Narayanan et al., SOSP 2019) cuts by such a program for the slowest stage alone; AdaPipe
(Sun et al., ASPLOS 2024) lets the number in flight decide what each stage recomputes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fxzero.errors import UsageError

_NEVER = float("inf")
_ROUNDING = 1 + 1e-9  # bounds add up in another order than the times that they are compared to

Seconds = Callable[[int, int, int], float]
_Table = NDArray[np.float64]
_Suffix = tuple[float, float, tuple[int, ...]]  # its slowest stage, their total, where each starts


@dataclass(frozen=True)
class Partition:
    """A row of units in contiguous stages.

    Attributes:
        cuts: the first unit of every stage but the first.
        slowest: seconds that one micro-batch takes in the slowest stage.
        total: seconds that it takes in all stages together.
    """

    cuts: tuple[int, ...]
    slowest: float
    total: float

    def step_seconds(self, microbatches: int) -> float:
        """The modelled time of a step: the slowest stage paces all micro-batches but one."""
        return (microbatches - 1) * self.slowest + self.total


def partition(
    units: int,
    stages: int,
    microbatches: int,
    seconds: Seconds,
    *,
    keep: int = 1,
    in_flight: Callable[[int], int] | None = None,
) -> list[Partition]:
    """The ``keep`` partitions of least modelled time, exactly, best first.

    Of equal times, the one whose slowest stage takes less goes first, then the one with earlier
    cuts.  Where more have equal times than there is room for, their suffixes decide, by slowest
    stage (whatever none can be below counts as equal), then total, then earlier cuts.

    Args:
        units: how many units there are, numbered from 0.
        seconds: ``seconds(start, stop, in_flight)``, what one micro-batch takes in a stage of the
            units ``start`` to ``stop - 1`` that holds ``in_flight`` of them: forward, backward,
            recompute and sending; infinite if it does not fit.  Not called twice for the same.
        keep: how many to return, if there are as many.
        in_flight: how many micro-batches the k-th stage from the end holds, counted from 1;
            min(microbatches, k), as under 1F1B, if left out.

    Returns:
        An empty list if no partition fits.

    Raises:
        UsageError: fewer than one stage or micro-batch, or more stages than units.
    """
    if microbatches < 1:
        raise UsageError(f"microbatches={microbatches} must be at least 1")
    if not 1 <= stages <= units:
        raise UsageError(
            f"stages={stages} must be at least 1 and at most {units}: "
            "each stage needs a unit of its own"
        )
    assert keep >= 1
    in_flight = in_flight or (lambda k: min(microbatches, k))
    times = _times(units, stages, seconds, in_flight)
    most_even = _solve(times, microbatches, lambda suffixes: sorted(suffixes)[:keep])
    if not most_even:
        return []
    best = _solve(
        times,
        microbatches,
        lambda suffixes: _undominated(suffixes, keep),
        slowest_from=most_even[0].slowest,
        at_most=max(found.step_seconds(microbatches) for found in most_even) * _ROUNDING,
    )
    best.sort(key=lambda p: (p.step_seconds(microbatches), p.slowest, p.cuts))
    return best[:keep]


def _times(
    units: int, stages: int, seconds: Seconds, in_flight: Callable[[int], int]
) -> list[_Table]:
    """By start and stop, the seconds of the last stage, of the one before it, and so on."""
    seconds = cache(seconds)
    times = []
    for k in range(1, stages + 1):
        table = np.full((units + 1, units + 1), _NEVER)
        held = in_flight(k)
        # Every stage before and after this one takes a unit at least.
        for start in range(stages - k, units - k + 1 if k < stages else 1):
            for stop in range(start + 1 if k > 1 else units, units - k + 2):
                table[start, stop] = seconds(start, stop, held)
        times.append(table)
    return times


def _solve(
    times: list[_Table],
    microbatches: int,
    select: Callable[[list[_Suffix]], list[_Suffix]],
    slowest_from: float = 0.0,
    at_most: float = _NEVER,
) -> list[Partition]:
    """The dynamic program: partitions of all units.

    Args:
        select: which suffixes, of the same units in as many stages, to go on with.
        slowest_from: seconds that the slowest stage of every partition takes at least.
        at_most: seconds of a step above which no partition is wanted.
    """
    units = len(times[0]) - 1
    best: dict[int, list[_Suffix]] = {units: [(slowest_from, 0.0, ())]}
    for table, before in zip(times, _least_before(times), strict=True):
        longer = {}
        for start in np.flatnonzero(np.isfinite(before)).tolist():
            left = at_most - float(before[start])
            found = select(_extend(best, table[start].tolist(), microbatches, left))
            longer[start] = [(slowest, total, (start, *starts)) for slowest, total, starts in found]
        best = longer
    return [Partition(starts[1:], slowest, total) for slowest, total, starts in best[0]]


def _least_before(times: list[_Table]) -> list[_Table]:
    """For each stage from the last, by its start, the least seconds of all stages before it."""
    least = np.full(len(times[0]), _NEVER)
    least[0] = 0.0
    before = [least]
    for table in times[:0:-1]:
        before.append((before[-1][:, None] + table).min(axis=0))
    return before[::-1]


def _extend(
    best: dict[int, list[_Suffix]], row: list[float], microbatches: int, at_most: float
) -> list[_Suffix]:
    """All suffixes with one more stage, whose seconds ``row`` gives by where it stops."""
    longer = []
    for stop, suffixes in best.items():
        seconds = row[stop]
        if seconds == _NEVER:
            continue
        for slowest, total, starts in suffixes:
            slowest, total = max(seconds, slowest), seconds + total
            if (microbatches - 1) * slowest + total <= at_most:
                longer.append((slowest, total, starts))
    return longer


def _undominated(suffixes: list[_Suffix], keep: int) -> list[_Suffix]:
    """Suffixes that fewer than ``keep`` others match or beat in both slowest stage and total."""
    kept = []
    least_totals: list[float] = []
    for suffix in sorted(suffixes):
        total = suffix[1]
        if len(least_totals) < keep or total < least_totals[-1]:
            kept.append(suffix)
            insort(least_totals, total)
            del least_totals[keep:]
    return kept
