"""The page's table of tensors: every large value of a Plan, equal layers in one row.

A value that is saved and alive at the peak is one entry, with the reason for saving it.  The page
shows folded rows; all values by themselves travel with it as numbers and a list of texts, from
which its script makes rows when it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fxzero.plans import Plan, Value
from fxzero.report.folding import Row, fold
from fxzero.units import format_seconds

# The most rows, and single values besides, that travel with a page.
_MOST_ROWS, _MOST_VALUES = 1500, 6000


@dataclass(frozen=True)
class TensorRow:
    """A row of the table.

    Attributes:
        at_peak: whether its values are alive at the peak.
        when: '1.20 s to 3.40 s', or '' where it is not known.
    """

    row: Row
    at_peak: bool
    when: str


@dataclass(frozen=True)
class Tensors:
    """The rows of the page's table, largest total first, and what was left out of it."""

    rows: list[TensorRow]
    left_out: int
    left_out_bytes: int


def tensor_table(plan: Plan) -> Tensors:
    """The largest rows."""
    rows = tensor_rows(plan)
    rest = rows[_MOST_ROWS:]
    return Tensors(rows[:_MOST_ROWS], len(rest), sum(each.row.total_bytes for each in rest))


def tensor_rows(plan: Plan) -> list[TensorRow]:
    """All rows, largest total first."""
    rows = [
        TensorRow(row, at_peak, when(plan, row.first, row.last))
        for at_peak in (True, False)
        for row in fold(value for value, there in entries(plan) if there is at_peak)
    ]
    return sorted(rows, key=lambda each: -each.row.total_bytes)


def entries(plan: Plan) -> list[tuple[Value, bool]]:
    """Every value once, and whether it is alive at the peak."""
    reasons = {_identity(value): value for value in plan.saved}
    found: list[tuple[Value, bool]] = []
    there = set()
    for value in plan.peak.alive:
        saved = reasons.get(_identity(value))
        if saved is not None:
            value = replace(value, reason=saved.reason, seconds=saved.seconds)
        there.add(_identity(value))
        found.append((value, True))
    others = (*plan.saved, *plan.recomputed, *plan.offloaded)
    found += [(value, False) for value in others if _identity(value) not in there]
    return found


def _identity(value: Value) -> tuple[object, ...]:
    return value.name, value.bytes, value.module, value.role, value.first, value.last


def when(plan: Plan, first: int, last: int) -> str:
    """Between which modelled seconds of the step something is there."""
    if len(plan.timeline) != 1 or not 0 <= first <= last:
        return ""
    seconds = plan.timeline[0].seconds
    if last >= len(seconds):
        return ""
    if first == 0 and last == len(seconds) - 1:
        return "all the time"
    if first == last == len(seconds) - 1:
        return "optimizer step"
    # Up to the instant at which it is there no longer.
    end = seconds[min(last + 1, len(seconds) - 1)]
    return f"{format_seconds(seconds[first])} to {format_seconds(end)}"


def single_values(plan: Plan) -> dict[str, Any]:
    """All values one by one; texts are numbers of a list."""
    texts: dict[str, int] = {}

    def text(of: str) -> int:
        return texts.setdefault(of, len(texts))

    found = sorted(entries(plan), key=lambda entry: -entry[0].bytes)
    rows = [
        [
            value.bytes, text(value.role), text(_place(value)), text(value.shape),
            text(value.source), text(value.reason), text(when(plan, value.first, value.last)),
            int(at_peak),
        ]
        for value, at_peak in found[:_MOST_VALUES]
    ]  # fmt: skip
    return {"texts": list(texts), "rows": rows, "left_out": len(found) - len(rows)}


def _place(value: Value) -> str:
    if not value.module or value.name.startswith(value.module):
        return value.name
    return f"{value.module} {value.name}"


def roles_in(rows: Iterable[TensorRow]) -> list[str]:
    """For the filter."""
    return sorted({row.row.role for row in rows})
