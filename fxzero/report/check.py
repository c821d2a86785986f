"""``fxzero plan --check budget.toml``: whether a model outgrew its limits, what grew, and a patch.

Reads a Plan and a budget file, decides nothing else; the patch raises exactly the limits that are
exceeded and records what the model takes now.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fxzero.budget_file import BudgetFile, Recorded, recorded_values
from fxzero.plans import Plan
from fxzero.report.wording import count, printable, signed_bytes
from fxzero.units import format_bytes, format_seconds, parse_budget

_ROWS = 8


@dataclass(frozen=True)
class Growth:
    """A place whose values take more than when they were recorded.

    Attributes:
        before: None if they were not recorded.
        least: by how many bytes they grew at least; what was not recorded was not large.
    """

    name: str
    before: Recorded | None
    after: Recorded
    least: int


def exceeded(file: BudgetFile, plan: Plan) -> list[str]:
    """A sentence for each limit that the plan exceeds."""
    result = []
    if not plan.fits:
        budget, needed = plan.request.memory_budget or 0, plan.minimum_budget
        result.append(
            f"memory_budget  {format_bytes(budget)}, the smallest with a plan is "
            f"{format_bytes(needed)}"
        )
    peak, seconds = parse_budget(file.limits.peak), file.limits.step_seconds
    if peak is not None and plan.peak_bytes > peak:
        result.append(
            f"peak           {format_bytes(peak)}, planned {format_bytes(plan.peak_bytes)}"
        )
    if seconds is not None and plan.step_seconds > seconds:
        result.append(
            f"step_seconds   {format_seconds(seconds)}, modelled "
            f"{format_seconds(plan.step_seconds)}"
        )
    return result


def growths(file: BudgetFile, plan: Plan) -> list[Growth]:
    """What takes more at the peak than in the file, the most first.

    Tensors come before totals, such as the optimizer's, that only follow from them.
    """
    before = file.accepted.values if file.accepted else {}
    unrecorded = file.accepted.unrecorded_bytes if file.accepted else 0
    result = []
    for name, after in recorded_values(plan.peak.alive).items():
        old = before.get(name)
        least = after.bytes - (old.bytes if old else unrecorded)
        if least > 0 and not (old and old.size == after.size):
            result.append(Growth(name, old, after, least))
    return sorted(result, key=lambda g: (not g.after.shape, -g.least, g.name))


def render(file: BudgetFile, plan: Plan, updated: str) -> str:
    """The verdict in the first line; if a limit is exceeded, what grew, and the patch."""
    return "\n".join(_lines(file, plan, updated))


def _lines(file: BudgetFile, plan: Plan, updated: str) -> Iterator[str]:
    broken, accepted = exceeded(file, plan), file.accepted
    verdict = "OUTGREW its budget" if broken else "within its budget"
    yield (
        f"{file.path}: {printable(plan.model.name)} {verdict}, peak "
        f"{format_bytes(plan.peak_bytes)}, step {format_seconds(plan.step_seconds)} modelled"
    )
    for sentence in broken:
        yield f" {sentence}"
    if accepted and accepted.peak != format_bytes(plan.peak_bytes):
        yield f" accepted       peak {accepted.peak}, step {format_seconds(accepted.step_seconds)}"
    if not broken:
        return
    yield from _grown(growths(file, plan), known=accepted is not None)
    yield f"to accept this: fxzero plan --check {file.path} --accept, or the patch"
    yield patch(file, updated).rstrip()


def _grown(found: list[Growth], *, known: bool) -> Iterator[str]:
    if not found:
        yield "no value at the peak takes more than was recorded"
        return
    yield "what grew" if known else "nothing was accepted before; the largest values at the peak"
    for growth in found[:_ROWS]:
        yield f" {signed_bytes(growth.least):>9}  {growth.name}  {growth.after.line}".rstrip()
        yield f"            {_change(growth)}"
    if len(found) > _ROWS:
        rest = sum(growth.least for growth in found[_ROWS:])
        yield f" {signed_bytes(rest):>9}  in {count(len(found) - _ROWS, 'smaller change')}"


def _change(growth: Growth) -> str:
    """'float32[8, 512] -> float32[8, 1024], 12 -> 16 of them, 1.00 MiB -> 2.67 MiB'."""
    before, after = growth.before, growth.after
    old = before or after
    facts = [
        _pair(old.shape, after.shape),
        f"{_pair(str(old.count), str(after.count))} of them" if after.count > 1 else "",
        f"{before.size} -> {after.size}" if before else f"{after.size}, not recorded before",
    ]
    return ", ".join(fact for fact in facts if fact)


def _pair(before: str, after: str) -> str:
    return after if before == after else f"{before} -> {after}"


def patch(file: BudgetFile, updated: str) -> str:
    """A unified diff of the file, as ``git apply`` takes it."""
    name = os.path.relpath(file.path)
    return "".join(
        difflib.unified_diff(
            file.text.splitlines(keepends=True),
            updated.splitlines(keepends=True),
            f"a/{name}",
            f"b/{name}",
        )
    )
