"""Why each saved, recomputed or offloaded value is where it is, and which line of code made it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxzero.errors import UsageError
from fxzero.plans import Plan, Value
from fxzero.report import wording
from fxzero.report.folding import Row, fold
from fxzero.report.wording import printable
from fxzero.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Explanation:
    """Rows for saved, recomputed and offloaded values, each largest first; ``str`` prints them."""

    plan: Plan
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return "\n".join(printable(line) for line in self._lines())

    def _lines(self) -> Iterator[str]:
        plan = self.plan
        yield (
            f"{plan.model.name}  plan {plan.hash[:8]}  "
            f"peak {format_bytes(plan.peak_bytes)}  {wording.verdict(plan)}"
        )
        for role, values in _sections(plan):
            size = format_bytes(sum(value.bytes for value in values))
            yield ""
            yield f"{role}: {wording.count(len(values), 'value')}, {size}"
            for row in self.rows:
                if row.role == role:
                    yield from _describe(row)


def explain(
    model: nn.Module, *inputs: Any, memory_budget: int | str | None = None, **kwargs: Any
) -> Explanation:
    """Every saved, recomputed or offloaded value of ``model(*inputs, **kwargs)``.

    Equal layers are folded.

    Args:
        model: a compiled model, whose plan in force is explained, or a plain one, which is
            planned with these inputs and under this budget.

    Raises:
        UsageError: a budget for a model that is compiled already.
    """
    plan = getattr(model, "plan", None)
    if not isinstance(plan, Plan):
        from fxzero.forecast import plan as make_plan

        return _explanation(make_plan(model, inputs, kwargs=kwargs, memory_budget=memory_budget))
    if memory_budget is not None:
        raise UsageError(
            f"memory_budget={memory_budget!r}: this model is compiled, its plan is made\n"
            "  explain the model before it is compiled, or leave memory_budget out"
        )
    return _explanation(plan)


def explain_plan(plan: Plan) -> str:
    """The explanation as text."""
    return str(_explanation(plan))


def _explanation(plan: Plan) -> Explanation:
    return Explanation(plan, tuple(row for _, values in _sections(plan) for row in fold(values)))


def _sections(plan: Plan) -> list[tuple[str, tuple[Value, ...]]]:
    sections = [("saved", plan.saved), ("recomputed", plan.recomputed)]
    return [*sections, ("offloaded", plan.offloaded)] if plan.request.offload else sections


def _describe(row: Row) -> Iterator[str]:
    each = f", {format_bytes(row.bytes)} each" if row.count > 1 else ""
    what = "there and back" if row.role == "offloaded" else "to compute again"
    price = f", {format_seconds(row.seconds)} {what}" if row.seconds else ""
    yield f" {format_bytes(row.total_bytes):>8}  {row.label}  {row.shape}{each}{price}"
    for detail in (row.source, row.reason):
        if detail:
            yield f"           {detail}"
