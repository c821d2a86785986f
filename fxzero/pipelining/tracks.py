"""What each rank of a pipeline holds over the seconds of a step, as its Plan draws it.

A rehearsal says what a rank holds while it computes something and behind it, by what else waits
then; the simulator says when it does.  Micro-batches that were not rehearsed hold what others do in
the same situation, or in the next larger one; in the largest, where the order that planned times
ask for has more waiting than the one that was rehearsed.

    rehearsed   F0.0 holds 5, 3 behind it      simulated   F0.0 from 0 s to 2 s
    track       0 s: 5    2 s: 3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fxzero.pipelining.rank_plan import RankPlan, waiting_at
from fxzero.pipelining.rehearsal import Step
from fxzero.pipelining.schedules import Action, Schedule
from fxzero.pipelining.simulation import Simulation
from fxzero.plans import Track
from fxzero.tracks import kept, of_each_rank, track


def rank_track(
    rank: int, found: RankPlan[Any], schedule: Schedule, played: Simulation, end: float
) -> Track:
    """A rank's bytes by role.

    Args:
        end: when the optimizer's step begins.
    """
    static = sum(found.static.values())
    seconds: list[float] = []
    roles: list[dict[str, int]] = []
    before = static
    steps = _steps(found, schedule.orders[rank])
    for span in played.spans:
        if span.rank != rank:
            continue
        step = steps[span.action]
        held = min(before, step.after)
        seconds += span.start, span.end
        roles += _roles(found.static, held, step.during), _roles(found.static, step.after)
        before = step.after
    chosen = kept(seconds, [sum(each.values()) for each in roles], of_each_rank(schedule.ranks))
    return track(
        rank,
        [*(seconds[index] for index in chosen), max([end, *seconds[-1:]])],
        [*(roles[index] for index in chosen), _roles(found.kept, 0, found.updating_bytes)],
    )


def _roles(static: Mapping[str, int], held: int, most: int | None = None) -> dict[str, int]:
    """Bytes by role, where a rank holds ``held`` bytes, and ``most`` while it computes."""
    always = sum(static.values())
    saved = max(held - always, 0)
    beside = 0 if most is None else max(most - always - saved, 0)
    return {**static, "saved": saved, "temporary": beside}


def _steps(found: RankPlan[Any], order: tuple[Action, ...]) -> dict[Action, Step]:
    """What the rank holds at each action of its whole order."""
    known: dict[tuple[object, ...], list[tuple[Counter[Any], Step]]] = {}
    played = dict(found.rehearsed)
    for action, waiting in waiting_at(played):
        known.setdefault((action.stage, action.kind), []).append((waiting, played[action]))
    steps = {}
    for action, waiting in waiting_at(order):
        alike = known[action.stage, action.kind]
        larger = [
            (other.total(), -step.during, index)
            for index, (other, step) in enumerate(alike)
            if all(count <= other[key] for key, count in waiting.items())
        ]
        index = min(larger)[-1] if larger else _largest(alike)
        steps[action] = alike[index][1]
    return steps


def _largest(steps: list[tuple[Counter[Any], Step]]) -> int:
    return max(range(len(steps)), key=lambda index: steps[index][1].during)
