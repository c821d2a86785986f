"""A Plan as one self-contained HTML page: no network, no fonts; light, dark, phone, desk, print.

The page is ASCII, escapes everything that it takes from the plan, and forbids itself to load
anything.  All that it says stands in it without its script, which sorts, filters and points.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from fxzero.plans import Alternative, Plan
from fxzero.report import accuracy, charts, tables, wording
from fxzero.units import format_bytes, format_count, format_seconds


def render(plan: Plan) -> str:
    """The page; it can be opened from disk and mailed around."""
    timeline = charts.timeline(plan)
    tensors = tables.tensor_table(plan)
    return fill(
        "plan.html.j2",
        plan=plan,
        ranks=wording.equal_ranks(plan.ranks),
        roles=wording.roles_of(plan),
        timeline=timeline,
        curve=charts.curve(plan),
        what_if=_what_if(plan),
        tensors=tensors,
        tensor_roles=tables.roles_in(tensors.rows),
        errors=accuracy.errors(),
        error_bar=accuracy.peak_range(plan),
        data={"areas": areas_data(timeline), "tensors": tables.single_values(plan)},
    )


def fill(template: str, **values: Any) -> str:
    """A template of this package as a page."""
    page = _environment().get_template(template).render(**values)
    # Character references also carry what no encoding can, such as a lone surrogate.
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii").lstrip()


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
    environment.filters["capitalize"] = lambda text: text[:1].upper() + text[1:]
    environment.globals |= {"wording": wording, "bars": _bars}
    return environment


def areas_data(timeline: charts.Timeline | None, name: str = "") -> list[dict[str, Any]]:
    """What the script reads of each chart.

    Args:
        name: what to call a chart that is the only one of its plan.
    """
    areas = timeline.areas if timeline else ()
    return [
        {
            "name": f"{name}rank {area.track.rank}, " if len(areas) > 1 else name,
            "lefts": area.lefts,
            "times": [format_seconds(at) for at in area.track.seconds],
            "roles": [(band.role, area.track.bytes[band.role]) for band in area.bands],
        }
        for area in areas
    ]


def _what_if(plan: Plan) -> Iterator[Alternative]:
    """This plan, what else one could write, and the budgets that were swept."""
    yield Alternative("this plan", plan.peak_bytes, plan.step_seconds, plan.fits)
    yield from plan.alternatives
    budget = plan.request.memory_budget
    known = {other.peak_bytes for other in plan.alternatives} | {plan.peak_bytes}
    for point in plan.curve:
        if point.peak_bytes not in known:
            change = f"a budget of {format_bytes(point.peak_bytes)}"
            fits = budget is None or point.peak_bytes <= budget
            yield Alternative(change, point.peak_bytes, point.step_seconds, fits)


def _bars(breakdown: Mapping[str, int], roles: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    """(role, from the left, width) in percent of the whole."""
    whole, left = sum(breakdown.values()) or 1, 0.0
    for role in roles:
        if size := breakdown.get(role, 0):
            width = 100 * size / whole
            yield role, round(left, 3), round(width, 3)
            left += width
