"""What changed between two Plans: settings, totals, the values that grew or shrank most.

``diff`` says it as text; ``diff_page.py`` makes a page of the same facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fxzero.plans import Plan, Value
from fxzero.report import wording
from fxzero.report.folding import pattern
from fxzero.report.wording import printable
from fxzero.units import format_bytes, format_seconds

_VALUE_ROWS = 10


@dataclass(frozen=True)
class Total:
    """A figure of the whole plan, before and after; ``percent`` is '' where there is none."""

    name: str
    before: str
    after: str
    percent: str


@dataclass(frozen=True)
class Change:
    """Bytes of one role at one place of the model, layers taken together."""

    role: str
    place: str
    before: int
    after: int

    @property
    def more(self) -> int:
        return self.after - self.before


def diff(before: Plan, after: Plan) -> str:
    """The changes from ``before`` to ``after``; one line says so if there are none."""
    lines = [_side("before", before), _side("after", after)]
    if before == after:
        return "\n".join([*lines, "the plans are equal"])
    sections = (_settings, _totals, _values, _notes)
    for section in sections:
        block = list(section(before, after))
        lines += ["", *block] if block else []
    return "\n".join(printable(line) for line in lines)


def _side(which: str, plan: Plan) -> str:
    budget = wording.budget_text(plan)
    facts = [f"plan {plan.hash[:8]}", plan.model.name, wording.device_text(plan), budget]
    facts += [wording.verdict(plan), wording.solved(plan)]
    return f"{which:<7} " + "  ".join(fact for fact in facts if fact)


def _settings(before: Plan, after: Plan) -> Iterator[str]:
    if before.graph_digest != after.graph_digest:
        yield OTHER_GRAPH
    for name, old, new in settings(before, after):
        yield f"{name:<28} {old} -> {new}"


OTHER_GRAPH = "the graphs differ: another model, other inputs, or another torch"


def settings(before: Plan, after: Plan) -> Iterator[tuple[str, str, str]]:
    """(name, before, after) of what was asked for or found otherwise."""
    for name, read in _SETTINGS:
        if read(before) != read(after):
            yield name, read(before), read(after)


_SETTINGS: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("model", lambda plan: plan.model.name),
    ("inputs", lambda plan: ", ".join(plan.model.inputs)),
    ("optimizer", lambda plan: plan.request.optimizer),
    ("recompute policy", lambda plan: plan.request.recompute),
    ("objective", lambda plan: plan.request.objective),
    ("inner", lambda plan: plan.request.inner),
    ("gradients", lambda plan: "added to" if plan.request.accumulate else "made anew"),
    ("device", lambda plan: plan.request.device),
    ("hardware", lambda plan: plan.request.hardware or "not named"),
    ("mesh", lambda plan: wording.mesh_text(plan) or "one device"),
    ("torch", lambda plan: plan.torch_version),
    ("fxzero", lambda plan: plan.fxzero_version),
    ("passes", lambda plan: ", ".join(plan.passes)),
)


def _totals(before: Plan, after: Plan) -> Iterator[str]:
    for total in totals(before, after):
        change = f"  ({total.percent})" if total.percent else ""
        yield f"{total.name:<28} {total.before} -> {total.after}{change}"


def totals(before: Plan, after: Plan) -> Iterator[Total]:
    """The figures that differ."""
    quantities: list[tuple[str, Callable[[Plan], float | None], Callable[[float], str]]] = [
        ("budget", lambda p: p.request.memory_budget, format_bytes),
        ("peak", lambda p: p.peak_bytes, format_bytes),
        ("peak without recompute", lambda p: p.unplanned_peak_bytes, format_bytes),
        ("smallest budget with a plan", lambda p: p.minimum_budget, format_bytes),
        ("step", lambda p: p.step_seconds, format_seconds),
        ("recompute", lambda p: p.recompute_seconds, format_seconds),
        ("recomputed work", lambda p: p.recompute_flops, wording.format_flops),
        ("recomputed values", lambda p: len(p.decisions.recompute), str),
        ("offloaded values", lambda p: len(p.offloaded), str),
        ("host memory", lambda p: p.host_bytes, format_bytes),
        ("saved values", lambda p: len(p.decisions.saved), str),
    ]
    for name, read, text in quantities:
        old, new = read(before), read(after)
        if old == new:
            continue
        was, now = ("none" if side is None else text(side) for side in (old, new))
        percent = "" if old is None or new is None or not old else _percent(old, new)
        yield Total(name, was, now, percent)


def _percent(old: float, new: float) -> str:
    return f"{100 * (new - old) / old:+.1f} %"


def _values(before: Plan, after: Plan) -> Iterator[str]:
    for title, found in changes(before, after):
        yield title
        for change in found[:_VALUE_ROWS]:
            yield (
                f" {wording.signed_bytes(change.more):>9}  {change.role:<10}  {change.place}  "
                f"{format_bytes(change.before)} -> {format_bytes(change.after)}"
            )
        if len(found) > _VALUE_ROWS:
            yield f" and {len(found) - _VALUE_ROWS} smaller changes"


def changes(before: Plan, after: Plan) -> Iterator[tuple[str, list[Change]]]:
    """Bytes by place and role, over what is alive at the peak, saved, recomputed or offloaded."""
    for title, read in _LISTS:
        old, new = _sizes(read(before)), _sizes(read(after))
        found = [
            Change(*key, old.get(key, 0), new.get(key, 0))
            for key in dict.fromkeys([*old, *new])
            if old.get(key, 0) != new.get(key, 0)
        ]
        if found:
            yield title, sorted(found, key=lambda change: -abs(change.more))


_LISTS: tuple[tuple[str, Callable[[Plan], Iterable[Value]]], ...] = (
    ("alive at the peak", lambda plan: plan.peak.alive),
    ("saved", lambda plan: plan.saved),
    ("recomputed", lambda plan: plan.recomputed),
    ("offloaded", lambda plan: plan.offloaded),
)


def _sizes(values: Iterable[Value]) -> dict[tuple[str, str], int]:
    sizes: dict[tuple[str, str], int] = {}
    for value in values:
        key = (value.role, pattern(value))
        sizes[key] = sizes.get(key, 0) + value.bytes
    return sizes


def _notes(before: Plan, after: Plan) -> Iterator[str]:
    gone, new = notes(before, after)
    yield from (f"note gone: {note}" for note in gone)
    yield from (f"note new: {note}" for note in new)


def notes(before: Plan, after: Plan) -> tuple[list[str], list[str]]:
    """Those that are gone, and those that are new."""
    gone = [note for note in before.notes if note not in after.notes]
    return gone, [note for note in after.notes if note not in before.notes]
