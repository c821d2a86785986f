"""A Plan as one self-contained HTML page: no network, no fonts, light and dark, phone and desk.

The page is ASCII, escapes everything that it takes from the plan, and forbids itself to load
anything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jinja2

from fxzero.plans import PipelinePlan, Plan
from fxzero.report import wording
from fxzero.report.folding import fold
from fxzero.units import format_bytes, format_count, format_seconds

# A budget far above the curve would flatten it, and is told in words instead.
_TALLEST = 2.5
_HELD_ALL_STEP = ("parameter", "buffer", "optimizer")


def render(plan: Plan) -> str:
    """The page; it can be opened from disk and mailed around."""
    page = (
        _environment()
        .get_template("plan.html.j2")
        .render(
            plan=plan,
            ranks=wording.equal_ranks(plan.ranks),
            roles=wording.roles_of(plan),
            alive=fold(plan.peak.alive),
            saved=fold(plan.saved),
            recomputed=fold(plan.recomputed),
            offloaded=fold(plan.offloaded),
            chart=_chart(plan),
            lanes=_lanes(plan.pipeline) if plan.pipeline else (),
        )
    )
    # Character references also carry what no encoding can, such as a lone surrogate.
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxzero.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    environment.filters["seconds"] = format_seconds
    environment.filters["amount"] = format_count
    environment.globals["wording"] = wording
    return environment


@dataclass(frozen=True)
class _Line:
    """A horizontal line of the chart, in percent from the top."""

    top: float
    text: str


@dataclass(frozen=True)
class _Chart:
    """The memory timeline in a box of 100 by 100, y pointing down.

    Attributes:
        area, held: SVG paths of all bytes, and of those that stay for the whole step.
        held_bytes: how much stays for the whole step.
        peak: where the curve is highest, in percent from the left and the top.
        budget, unplanned: None where they lie far above the curve, or are not asked for.
        points: (percent from the left, bytes) for the reader's pointer.
    """

    area: str
    held: str
    held_bytes: int
    peak: tuple[float, float]
    ticks: tuple[_Line, ...]
    budget: _Line | None
    unplanned: _Line | None
    points: tuple[tuple[float, int], ...]


def _chart(plan: Plan) -> _Chart | None:
    """None for a plan without a timeline."""
    if len(plan.timeline) < 2 or plan.peak_bytes <= 0:
        return None
    highest = max(plan.peak_bytes, *(size for _, size in plan.timeline))
    marks = [plan.request.memory_budget, plan.unplanned_peak_bytes]
    shown = [mark for mark in marks if mark is not None and mark <= _TALLEST * highest]
    top = 1.08 * max(highest, *shown, 1)
    first, last = plan.timeline[0][0], plan.timeline[-1][0]
    width = max(1, last - first)

    def line(size: int | None, text: str) -> _Line | None:
        return _Line(_percent(top - size, top), text) if size in shown and size else None

    points = tuple((_percent(position - first, width), size) for position, size in plan.timeline)
    steps = "".join(f"H{x}V{_percent(top - size, top)}" for x, size in points)
    breakdown = plan.ranks[0].breakdown if plan.ranks else {}
    lowest = min(size for _, size in plan.timeline)
    held = min(lowest, sum(breakdown.get(role, 0) for role in _HELD_ALL_STEP))
    at, size = max(points, key=lambda point: point[1])
    budget = plan.request.memory_budget
    return _Chart(
        area=f"M0,100{steps}V100Z",
        held=f"M0,100V{_percent(top - held, top)}H100V100Z",
        held_bytes=held,
        peak=(at, _percent(top - size, top)),
        ticks=tuple(_Line(_percent(top - tick, top), format_bytes(tick)) for tick in _ticks(top)),
        budget=line(budget, f"budget {format_bytes(budget or 0)}"),
        unplanned=line(
            plan.unplanned_peak_bytes if plan.unplanned_peak_bytes > plan.peak_bytes else None,
            f"without recompute {format_bytes(plan.unplanned_peak_bytes)}",
        ),
        points=points,
    )


@dataclass(frozen=True)
class _Turn:
    """A computation of a rank, in percent of the step from its start.

    Attributes:
        further: whether it is of another stage than the rank's first.
    """

    kind: str
    further: bool
    title: str
    left: float
    width: float


def _lanes(pipeline: PipelinePlan) -> list[list[_Turn]]:
    """What each rank computes when."""
    end = pipeline.end or 1.0
    lanes: list[list[_Turn]] = [[] for _ in range(pipeline.ranks)]
    for turn in pipeline.turns:
        lanes[turn.rank].append(
            _Turn(
                turn.kind,
                pipeline.is_further(turn),
                f"{turn.kind}{turn.stage}.{turn.microbatch}: {format_seconds(turn.start)} to "
                f"{format_seconds(turn.end)}",
                _percent(turn.start, end),
                _percent(turn.end - turn.start, end),
            )
        )
    return lanes


def _ticks(top: float) -> range:
    """Three to six round sizes."""
    step = 1
    while top / step > 6:
        step *= 2
    return range(0, int(top) + 1, step)


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2)
