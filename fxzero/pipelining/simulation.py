"""When each action of a schedule runs, and what its ranks hold meanwhile.

An action starts when its rank is free and its inputs have arrived.  What another rank computed
takes its time to arrive; sending keeps nobody from computing.

    rank 0   F0.0 F0.1  .    .   B0.0 ----  .   B0.1 ----       ".": a bubble
    rank 1    .   F1.0 B1.0 ---- F1.1 B1.1 ----  .    .

Exact against theory for equal stages: the bubbles of GPipe and 1F1B are (R - 1) / (M + R - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxzero.errors import UsageError
from fxzero.pipelining.schedules import Action, Kind, Schedule, StageTimes, Step, check_times


@dataclass(frozen=True)
class Span:
    """One action on its rank, from ``start`` to ``end`` seconds after the step began."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A step as it would run.

    Attributes:
        spans: all actions by their start.
        step_seconds: from the first start to the last end.
        busy: the seconds that each rank computes.
    """

    spans: tuple[Span, ...]
    step_seconds: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait, from 0 to 1."""
        available = len(self.busy) * self.step_seconds
        return 1.0 - sum(self.busy) / available if available else 0.0


def simulate(
    schedule: Schedule,
    times: Sequence[StageTimes],
    transfer_seconds: float | Sequence[float] = 0.0,
) -> Simulation:
    """Plays a schedule.

    Args:
        times: of each stage.
        transfer_seconds: between stages on different ranks, either way: one number, or one for each
            boundary between a stage and the next.

    Raises:
        UsageError: if a rank would wait for ever, or a number of stages or boundaries is wrong.
    """
    steps, starts, ends = _play(schedule, times, transfer_seconds)
    spans = [
        Span(step.rank, step.action, start, end)
        for step, start, end in zip(steps, starts, ends, strict=True)
    ]
    spans.sort(key=lambda span: (span.start, span.end, span.rank))
    work = [[times[action.stage].of(action.kind) for action in order] for order in schedule.orders]
    return Simulation(tuple(spans), max(ends, default=0.0), tuple(map(sum, work)))


def step_seconds(
    schedule: Schedule,
    times: Sequence[StageTimes],
    transfer_seconds: float | Sequence[float] = 0.0,
) -> float:
    """The seconds of ``simulate``, without its spans."""
    return max(_play(schedule, times, transfer_seconds)[2], default=0.0)


def _play(
    schedule: Schedule, times: Sequence[StageTimes], transfer_seconds: float | Sequence[float]
) -> tuple[tuple[Step, ...], list[float], list[float]]:
    """The steps of a schedule, when each starts, and when it ends."""
    check_times(times, schedule.stages)
    delays = _delays(schedule, transfer_seconds)
    seconds = [{kind: each.of(kind) for kind in Kind} for each in times]
    steps = schedule.steps
    now = [0.0] * schedule.ranks
    starts, ends = [0.0] * len(steps), [0.0] * len(steps)
    for index, step in enumerate(steps):
        start, stage = now[step.rank], step.action.stage
        for source, at in step.needs:
            start = max(start, ends[at] + delays.get((source, stage), 0.0))
        starts[index] = start
        now[step.rank] = ends[index] = start + seconds[stage][step.action.kind]
    return steps, starts, ends


def _delays(schedule: Schedule, seconds: float | Sequence[float]) -> dict[tuple[int, int], float]:
    """Seconds from a stage to the next or back, where these are on different ranks."""
    boundaries = schedule.stages - 1
    if isinstance(seconds, (int, float)):
        seconds = [seconds] * boundaries
    if len(seconds) != boundaries:
        raise UsageError(
            f"transfer_seconds of {len(seconds)} boundaries: {schedule.stages} stages have "
            f"{boundaries}\n  give one number for all, or one for each"
        )
    delays = {}
    for stage, each in enumerate(seconds):
        if schedule.placement[stage] != schedule.placement[stage + 1]:
            delays[stage, stage + 1] = delays[stage + 1, stage] = each
    return delays


def peak_held(
    schedule: Schedule, saved: Sequence[float], kept: Sequence[float]
) -> tuple[float, ...]:
    """The most that each rank holds at once for backwards to come, in the unit of the arguments.

    Args:
        saved: what a micro-batch of each stage holds from its forward to its input gradient's end.
        kept: what of it its weight gradient needs, until that ends.
    """
    peaks = []
    for order in schedule.orders:
        now = peak = 0.0
        for action in order:
            stage = action.stage
            match action.kind:
                case Kind.FORWARD:
                    now += saved[stage]
                case Kind.INPUT_GRADIENT:
                    now += kept[stage] - saved[stage]
                case Kind.WEIGHT_GRADIENT:
                    now -= kept[stage]
                case Kind.BACKWARD:
                    now -= saved[stage]
            peak = max(peak, now)
        peaks.append(peak)
    return tuple(peaks)
