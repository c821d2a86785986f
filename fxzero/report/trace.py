"""A Plan as a trace that Perfetto and chrome://tracing open: phases or turns, and memory.

process 0  rank 0     phases       |  forward   |      backward      |
                      memory       a counter of bytes by role
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fxzero.plans import Plan, Track
from fxzero.report.tables import entries
from fxzero.report.wording import turn_kinds

_Event = dict[str, Any]
# Lives of the largest values are drawn, one under the other, where they are known.
_MOST_VALUES = 400


def render(plan: Plan) -> str:
    """The trace as JSON; times are microseconds of the model's clock."""
    events = [*_names(plan), *_phases(plan), *_turns(plan), *_values(plan)]
    for track in plan.timeline:
        events += _counters(track)
    about = {"plan": plan.hash, "model": plan.model.name, "fxzero": plan.fxzero_version}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _names(plan: Plan) -> Iterator[_Event]:
    ranks = plan.pipeline.ranks if plan.pipeline else 1
    for rank in range(ranks):
        name = f"rank {rank}" if plan.pipeline else "step"
        yield _about(rank, "process_name", name)
        yield _about(rank, "thread_name", "turns" if plan.pipeline else "phases")


def _about(process: int, what: str, name: str, thread: int = 0) -> _Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": {"name": name}}


def _span(process: int, thread: int, name: str, start: float, end: float, **args: Any) -> _Event:
    return {
        "ph": "X", "pid": process, "tid": thread, "name": name, "ts": _micro(start),
        "dur": _micro(end - start), "args": args,
    }  # fmt: skip


def _phases(plan: Plan) -> Iterator[_Event]:
    if plan.pipeline is not None:
        return
    ends = [*(phase.start for phase in plan.phases[1:]), plan.step_seconds]
    for phase, end in zip(plan.phases, ends, strict=False):
        if end > phase.start:
            yield _span(0, 0, phase.name, phase.start, end, peak_bytes=phase.peak_bytes)


def _turns(plan: Plan) -> Iterator[_Event]:
    if plan.pipeline is None:
        return
    kinds = turn_kinds(plan.pipeline)
    for turn in plan.pipeline.turns:
        name = f"{turn.kind}{turn.stage}.{turn.microbatch}"
        about = {"stage": turn.stage, "microbatch": turn.microbatch, "kind": kinds.get(turn.kind)}
        yield _span(turn.rank, 0, name, turn.start, turn.end, **about)


def _values(plan: Plan) -> Iterator[_Event]:
    """The largest values that come and go, each on a line of its own."""
    if len(plan.timeline) != 1:
        return
    seconds = plan.timeline[0].seconds
    known = [
        value
        for value, _ in entries(plan)
        if 0 <= value.first <= value.last < len(seconds)
        and not (value.first == 0 and value.last == len(seconds) - 1)
    ]
    known.sort(key=lambda value: -value.bytes)
    for line, value in enumerate(known[:_MOST_VALUES], start=1):
        end = seconds[min(value.last + 1, len(seconds) - 1)]
        yield _about(0, "thread_name", f"{value.role} {value.module} {value.name}", line)
        yield _span(
            0, line, value.name, seconds[value.first], end,
            bytes=value.bytes, shape=value.shape, source=value.source, reason=value.reason,
        )  # fmt: skip


def _counters(track: Track) -> Iterator[_Event]:
    for index, at in enumerate(track.seconds):
        sizes = {role: track.of(role)[index] for role in track.bytes}
        yield {"ph": "C", "pid": track.rank, "name": "memory", "ts": _micro(at), "args": sizes}


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)
