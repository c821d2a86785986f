"""The peak of memory in a profiler's record, which sees what the dispatcher does not."""

from __future__ import annotations

import bisect
import itertools
from typing import Any

from fxzero import _torch


def peak_of_allocations(profiler: Any, *, inside_operators: bool = True) -> int:
    """Peak of the CPU bytes allocated since a memory profile started.

    Args:
        inside_operators: whether memory counts that an operator frees before it returns.
    """
    memory, operators = _torch.profiled_memory(profiler)
    scratch = set() if inside_operators else _scratch(memory, _outermost(operators))
    current = peak = 0
    for index, (_, change) in enumerate(memory):
        if index not in scratch:
            current += change
            peak = max(peak, current)
    return peak


def given_back(profiler: Any) -> int:
    """Most CPU bytes of a memory profile that were there besides those that it left."""
    memory, _ = _torch.profiled_memory(profiler)
    levels = list(itertools.accumulate((change for _, change in memory), initial=0))
    return max(levels) - levels[-1]


def _outermost(operators: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """When those began and ended that no other one called."""
    spans: list[tuple[int, int]] = []
    for start, end in operators:
        if not spans or start >= spans[-1][1]:
            spans.append((start, end))
    return spans


def _scratch(memory: list[tuple[int, int]], spans: list[tuple[int, int]]) -> set[int]:
    """Positions of allocations that the same operator frees, and of those frees."""
    starts = [start for start, _ in spans]
    made: dict[tuple[int, int], list[int]] = {}
    found: set[int] = set()
    for index, (time, change) in enumerate(memory):
        span = bisect.bisect_right(starts, time) - 1
        if span < 0 or time > spans[span][1]:
            continue
        if change > 0:
            made.setdefault((span, change), []).append(index)
        elif made.get((span, -change)):
            found |= {made[span, -change].pop(), index}
    return found
