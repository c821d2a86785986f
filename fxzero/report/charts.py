"""The geometry of the page's charts: boxes of 100 by 100, y pointing down, on one axis of time.

areas     a band for each role, stacked in reading order; the budget is a line over them
lanes     what each rank of a pipeline computes, under its own area, on the same axis
curve     budgets against step times
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxzero.plans import PipelinePlan, Plan, Track
from fxzero.report import wording
from fxzero.units import format_bytes, format_seconds

# A budget far above the areas would flatten them, and is told in words instead.
_TALLEST = 2.5
# Where the step ends and the optimizer's step, whose time is not modelled, begins.
_STEP_END = 96.0
# How much of the box a band must fill to carry its name, and over what part of the axis.
_LABEL_HEIGHT, _LABEL_WIDTH = 9.0, 12.0
_SMALL_LABEL_HEIGHT = 18.0
_LETTERED = 2.6


@dataclass(frozen=True)
class Line:
    """A line across a chart with its text, in percent from the top or the left."""

    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """What one role holds: an SVG path, and where its name stands, None if nowhere."""

    role: str
    path: str
    label: tuple[float, float] | None


@dataclass(frozen=True)
class Turn:
    """A computation of a rank.

    Attributes:
        further: whether it is of another stage than the rank's first.
        text: what stands in it, if it is wide enough.
    """

    kind: str
    further: bool
    title: str
    text: str
    left: float
    width: float


@dataclass(frozen=True)
class Area:
    """The memory of one rank over the step.

    Attributes:
        bands: from the bottom to the top.
        peak: where the sum is highest, in percent from the left and the top.
        ticks: sizes.
        budget, unplanned: None where they lie far above, or do not apply.
        lefts: of each instant, in percent.
        turns: what the rank computes, if it is one of a pipeline.
    """

    track: Track
    bands: tuple[Band, ...]
    peak: tuple[float, float]
    peak_bytes: int
    peak_seconds: float
    ticks: tuple[Line, ...]
    budget: Line | None
    unplanned: Line | None
    lefts: tuple[float, ...]
    turns: tuple[Turn, ...]

    def rows(self) -> list[tuple[str, list[int]]]:
        """A few instants in words: start, peak, end and some between."""
        count, totals = len(self.track.seconds), self.track.totals
        chosen = {count * part // 8 for part in range(8)} | {count - 1}
        chosen.add(totals.index(max(totals)))
        return [
            (
                format_seconds(self.track.seconds[index]),
                [totals[index], *(self.track.of(band.role)[index] for band in self.bands)],
            )
            for index in sorted(chosen)
        ]


@dataclass(frozen=True)
class Timeline:
    """All areas, their common axis, and where phases begin."""

    areas: tuple[Area, ...]
    roles: tuple[str, ...]
    seconds: tuple[Line, ...]
    phases: tuple[Line, ...]
    step_end: float = _STEP_END


def timeline(plan: Plan, beside: Plan | None = None) -> Timeline | None:
    """None for a plan without tracks.

    Args:
        beside: a plan whose chart has the same axes.
    """
    tracks = plan.timeline
    if not tracks or plan.peak_bytes <= 0:
        return None
    plans = [plan] if beside is None else [plan, beside]
    every = [track for each in plans for track in each.timeline]
    highest = max(*(each.peak_bytes for each in plans), *(max(each.totals) for each in every))
    end = max(track.seconds[-1] for track in every)
    budget, free = plan.request.memory_budget, plan.unplanned_peak_bytes
    marks = [budget, free if free > plan.peak_bytes else None]
    shown = [mark for mark in marks if mark and mark <= _TALLEST * highest]
    top = 1.08 * max(highest, *shown, 1)
    roles = wording.in_reading_order(role for track in tracks for role in track.bytes)
    small = len(tracks) > 1 or beside is not None
    areas = tuple(_area(plan, track, roles, shown, top, end, small) for track in tracks)
    return Timeline(
        areas=areas,
        roles=tuple(roles),
        seconds=tuple(Line(_left(at, end), format_seconds(at)) for at in _round_steps(end, 5)),
        phases=tuple(
            Line(_left(phase.start, end), phase.name)
            for phase in plan.phases
            if 0 < phase.start < end
        ),
    )


def _area(
    plan: Plan,
    track: Track,
    roles: Sequence[str],
    shown: Sequence[int],
    top: float,
    end: float,
    small: bool,
) -> Area:
    lefts = [_left(at, end) for at in track.seconds]
    base = [0] * len(lefts)
    bands = []
    for role in roles:
        sizes = track.of(role)
        if not any(sizes):
            continue
        upper = [low + size for low, size in zip(base, sizes, strict=True)]
        path = _band_path(lefts, base, upper, top)
        bands.append(Band(role, path, _label(lefts, base, upper, top, small)))
        base = upper
    at = base.index(max(base))

    def line(size: int | None, text: str) -> Line | None:
        return Line(_percent(top - size, top), text) if size in shown and size else None

    budget, free = plan.request.memory_budget, plan.unplanned_peak_bytes
    ticks = range(0, int(top) + 1, _tick(top, 3 if small else 6))
    return Area(
        track=track,
        bands=tuple(bands),
        peak=(lefts[at], _percent(top - base[at], top)),
        peak_bytes=base[at],
        peak_seconds=track.seconds[at],
        ticks=tuple(Line(_percent(top - tick, top), format_bytes(tick)) for tick in ticks),
        budget=line(budget, f"budget {format_bytes(budget or 0)}"),
        unplanned=line(free if not small else None, f"without recompute {format_bytes(free)}"),
        lefts=tuple(lefts),
        turns=_turns(plan.pipeline, track.rank, end) if plan.pipeline else (),
    )


def _left(at: float, end: float) -> float:
    return round(_STEP_END * at / end, 2) if end else 0.0


def _band_path(
    lefts: Sequence[float], lower: Sequence[int], upper: Sequence[int], top: float
) -> str:
    """Up along the band's top in steps to the right edge, and back along its bottom."""
    rights = [*lefts[1:], 100.0]
    path = [f"M{0}," + str(_percent(top - upper[0], top))]
    path += _steps(rights, upper, top)
    path.append(f"V{_percent(top - lower[-1], top)}")
    path += _steps([*lefts[:0:-1], 0], lower[::-1], top)
    return "".join(path) + "Z"


def _steps(edges: Sequence[float], sizes: Sequence[int], top: float) -> list[str]:
    """Each size up to its edge; neighbours of one height are one line."""
    path, drawn = [], None
    for index, (edge, size) in enumerate(zip(edges, sizes, strict=True)):
        height = _percent(top - size, top)
        if drawn is not None and height != drawn:
            path.append(f"V{height}")
        drawn = height
        following = sizes[index + 1] if index + 1 < len(sizes) else None
        if following is None or _percent(top - following, top) != height:
            path.append(f"H{edge}")
    return path


def _label(
    lefts: Sequence[float], lower: Sequence[int], upper: Sequence[int], top: float, small: bool
) -> tuple[float, float] | None:
    """The middle of the place where the band is thickest all along its name."""
    best = _SMALL_LABEL_HEIGHT if small else _LABEL_HEIGHT
    found, spans = None, list(zip([0.0, *lefts[1:]], [*lefts[1:], 100.0], strict=True))
    for start in range(0, int(_STEP_END - _LABEL_WIDTH), 3):
        end = start + _LABEL_WIDTH
        inside = [i for i, (left, right) in enumerate(spans) if left < end and right > start]
        bottom = max(lower[index] for index in inside)
        height = 100 * (min(upper[index] for index in inside) - bottom) / top
        if height > best:
            best = height
            found = start + _LABEL_WIDTH / 2, round(100 - 100 * bottom / top - height / 2, 1)
    return found


def _turns(pipeline: PipelinePlan, rank: int, end: float) -> tuple[Turn, ...]:
    """What a rank computes when."""
    turns = []
    for turn in pipeline.turns:
        if turn.rank == rank:
            width = round(_left(turn.end, end) - _left(turn.start, end), 2)
            turns.append(
                Turn(
                    turn.kind,
                    pipeline.is_further(turn),
                    f"{turn.kind}{turn.stage}.{turn.microbatch}: {format_seconds(turn.start)} to "
                    f"{format_seconds(turn.end)}",
                    f"{turn.kind}{turn.microbatch}" if width > _LETTERED else "",
                    _left(turn.start, end),
                    width,
                )
            )
    return tuple(turns)


@dataclass(frozen=True)
class Curve:
    """Budgets against step times.

    Attributes:
        path: from the smallest peak on, a step down at each point.
        points: (from the left, from the top, what it is) of each.
        here: where this plan lies.
        budget: from the left; None where it is beyond the chart.
    """

    path: str
    points: tuple[tuple[float, float, str], ...]
    here: tuple[float, float]
    bytes: tuple[Line, ...]
    seconds: tuple[Line, ...]
    budget: Line | None


def curve(plan: Plan) -> Curve | None:
    """None where there is nothing to choose from."""
    points = plan.curve
    if len(points) < 2:
        return None
    sizes = [*(point.peak_bytes for point in points), plan.peak_bytes]
    times = [*(point.step_seconds for point in points), plan.step_seconds]
    left, right = min(sizes), max(sizes)
    budget = plan.request.memory_budget
    if budget and left <= budget <= _TALLEST * right:
        right = max(right, budget)
    margin = max(6 * (right - left) // 100, 1)
    left, right = max(0, left - margin), right + margin
    slowest = 1.1 * max(times) or 1.0

    def place(size: float, seconds: float) -> tuple[float, float]:
        return _percent(size - left, right - left), _percent(slowest - seconds, slowest)

    placed = [place(point.peak_bytes, point.step_seconds) for point in points]
    steps = "".join(f"H{x}V{y}" for x, y in placed[1:])
    ticks = range(0, int(right) + 1, _tick(right - left, 5))
    texts = [f"{format_bytes(p.peak_bytes)}, {format_seconds(p.step_seconds)}" for p in points]
    return Curve(
        path=f"M{placed[0][0]},{placed[0][1]}{steps}H100",
        points=tuple((x, y, text) for (x, y), text in zip(placed, texts, strict=True)),
        here=place(plan.peak_bytes, plan.step_seconds),
        bytes=tuple(Line(place(t, 0)[0], format_bytes(t)) for t in ticks if t >= left),
        seconds=tuple(
            Line(place(left, at)[1], format_seconds(at)) for at in _round_steps(slowest, 4)
        ),
        budget=(
            Line(place(budget, 0)[0], f"budget {format_bytes(budget)}")
            if budget and left <= budget <= right
            else None
        ),
    )


def _tick(span: float, most: int) -> int:
    """A power of two that is in ``span`` at most ``most`` times."""
    step = 1
    while span / step > most:
        step *= 2
    return step


def _round_steps(end: float, most: int) -> Iterable[float]:
    """1, 2 or 5 times a power of ten, up to ``end``."""
    if not 0 < end < math.inf:
        return [0.0]
    step = 10.0 ** len(f"{int(end)}")
    while step / 10 > end / most:
        step /= 10
    for part in (0.1, 0.2, 0.5, 1.0):
        if step * part >= end / most:
            step *= part
            break
    return [index * step for index in range(int(end / step) + 1)]


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2)
