"""A Plan as plain text: the verdict in the first line, then what is where, why, and at what price.

No colours, ASCII only, equal layers folded, so that it reads the same in a log file and in a pull
request.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

from fxzero.plans import Plan, Value
from fxzero.report import wording
from fxzero.report.folding import Row, fold
from fxzero.report.wording import printable, share
from fxzero.units import format_bytes, format_count, format_seconds

_ALIVE_ROWS = 12
_RECOMPUTED_ROWS = 8
_BREAKDOWN_COLUMNS = 6
_CURVE_ENDS = 2
_CURVE_WIDTH = 40


def render(plan: Plan, width: int = 100) -> str:
    """The whole report, no line longer than ``width``."""
    sections = (
        _heading, _ranks, _pipeline, _alive, _recomputed, _offloaded, _curve, _alternatives, _notes,
    )  # fmt: skip
    blocks = [
        "\n".join(_clip(line, width) for line in section(plan, width)) for section in sections
    ]
    return "\n\n".join(block for block in blocks if block)


def _heading(plan: Plan, width: int) -> Iterator[str]:
    model = plan.model
    facts = [wording.device_text(plan), wording.budget_text(plan), wording.verdict(plan)]
    rest = "  ".join(fact for fact in facts if fact)
    start = f"fxzero {plan.fxzero_version} plan {plan.hash[:8]}  "
    yield start + _clip(model.name, max(8, width - len(start) - len(rest) - 2)) + "  " + rest
    if not plan.fits:
        smallest = f'memory_budget="{wording.rounded_up(plan.minimum_budget)}"'
        others = [other.change for other in plan.alternatives if other.fits]
        yield "to fit  " + "; or ".join([smallest, *others])
    parameters = f"{format_count(model.parameters)} parameters"
    yield (
        f"model   {parameters} ({format_bytes(model.parameter_bytes)}), "
        f"{plan.request.optimizer}, inputs {', '.join(model.inputs)}"
    )
    yield (
        f"peak    {format_bytes(plan.peak_bytes)}; "
        f"{format_bytes(plan.unplanned_peak_bytes)} without recompute; "
        f"smallest budget with a plan {format_bytes(plan.minimum_budget)}"
    )
    yield (
        f"step    {format_seconds(plan.step_seconds)} modelled, forward and backward; "
        f"solver: {wording.solved(plan)}"
    )
    if plan.states is not None:
        yield f"states  {wording.states_text(plan.states)}"
    mesh = wording.mesh_text(plan)
    if mesh and not plan.communication_seconds:
        yield f"mesh    {mesh}"
    elif mesh:
        yield (
            f"mesh    {mesh}; collectives take {format_seconds(plan.communication_seconds)}, the "
            f"step waits {format_seconds(plan.exposed_seconds)} for them "
            f"({share(plan.exposed_seconds, plan.step_seconds)})"
        )


def _ranks(plan: Plan, width: int) -> Iterator[str]:
    roles = wording.roles_of(plan)
    largest = sorted(roles, key=lambda r: -max(rank.breakdown.get(r, 0) for rank in plan.ranks))
    budget = plan.request.memory_budget
    columns_that_fit = _BREAKDOWN_COLUMNS - bool(budget)
    shown = [role for role in roles if role in largest[:columns_that_fit]]
    columns = [*shown, *(["other"] if len(roles) > len(shown) else []), "peak"]
    header = "rank    " + "".join(f"{column:>11}" for column in columns)
    yield header + ("  of budget" if budget else "")
    for name, rank in wording.equal_ranks(plan.ranks):
        sizes = [rank.breakdown.get(role, 0) for role in shown]
        if "other" in columns:
            sizes.append(rank.peak_bytes - sum(sizes))
        cells = "".join(f"{format_bytes(size):>11}" for size in [*sizes, rank.peak_bytes])
        yield f"{name:<8}" + cells + (f"{share(rank.peak_bytes, budget):>11}" if budget else "")
    yield "phases  " + "   ".join(f"{p.name} {format_bytes(p.peak_bytes)}" for p in plan.phases)


def _pipeline(plan: Plan, width: int) -> Iterator[str]:
    """Its stages, and a line of time for each rank."""
    pipeline = plan.pipeline
    if pipeline is None:
        return
    yield wording.pipeline_text(pipeline)
    columns = ("forward", "input", "weight", "in flight", "sends", "weights")
    places = max(len("begins at"), *(len(wording.begins(stage)) for stage in pipeline.stages))
    places = min(places, width - 14 - 10 * len(columns))
    yield f" stage  rank  {'begins at':<{places}}" + "".join(f"{name:>10}" for name in columns)
    for index, stage in enumerate(pipeline.stages):
        seconds = (stage.forward_seconds, stage.input_seconds, stage.weight_seconds)
        cells = [*map(format_seconds, seconds), str(stage.in_flight)]
        cells += [format_bytes(stage.sent_bytes), format_bytes(stage.weight_bytes)]
        place = _end(wording.begins(stage), places)
        yield f" {index:>5}  {stage.rank:>4}  {place:<{places}}" + "".join(
            f"{cell:>10}" for cell in cells
        )
    for rank, line in enumerate(wording.time_lines(pipeline, width - 10)):
        yield f" {rank:>5}  {line}"
    yield f"        {wording.time_legend(pipeline)}"


def _alive(plan: Plan, width: int) -> Iterator[str]:
    peak = plan.peak
    roles = max((len(value.role) for value in peak.alive), default=0)

    def cells(row: Row) -> str:
        return f"{share(row.total_bytes, peak.bytes):>6}  {row.role:<{roles}}"

    where = [peak.phase, peak.node, wording.short_source(peak.source)]
    yield "alive at the peak: " + ", ".join(part for part in where if part)
    yield from _table(peak.alive, cells, _ALIVE_ROWS, width)


def _recomputed(plan: Plan, width: int) -> Iterator[str]:
    yield wording.recompute_price(plan)
    if gathered := wording.gather_price(plan):
        yield gathered
    yield from _table(plan.recomputed, _seconds, _RECOMPUTED_ROWS, width)


def _offloaded(plan: Plan, width: int) -> Iterator[str]:
    if not plan.offloaded:
        return
    yield wording.offload_price(plan)
    yield from _table(plan.offloaded, _seconds, _RECOMPUTED_ROWS, width)


def _seconds(row: Row) -> str:
    return f"{format_seconds(row.seconds):>8}"


def _table(
    values: Sequence[Value], cells: Callable[[Row], str], limit: int, width: int
) -> Iterator[str]:
    """Bytes, cells, place and source line of the largest rows, and what the others sum to."""
    rows = fold(values)
    shown, others = rows[:limit], rows[limit:]
    starts = [f" {format_bytes(row.total_bytes):>8}  {cells(row)}  " for row in shown]
    sources = [wording.short_source(row.source) for row in shown]
    # Code may be cut at the right, its file and line not.
    lines = max((len(source.partition(" ")[0]) for source in sources), default=0)
    room = max(24, width - max(map(len, starts), default=0) - lines - len("  ..."))
    places = min(room, max((len(row.label) for row in shown), default=0))
    for start, row, source in zip(starts, shown, sources, strict=True):
        yield f"{start}{_shorten(row.label, places):<{places}}  {source}"
    if others:
        size = format_bytes(sum(row.total_bytes for row in others))
        yield f" {size:>8}  in {sum(row.count for row in others)} smaller values"


def _curve(plan: Plan, width: int) -> Iterator[str]:
    """Only where there are points between the ends."""
    if len(plan.curve) <= _CURVE_ENDS:
        return
    yield "peak against step time"
    price = "recompute and copies" if plan.request.offload else "recompute"
    slowest = max(point.step_seconds for point in plan.curve)
    for point in plan.curve:
        bar = "#" * round(_CURVE_WIDTH * point.step_seconds / slowest) if slowest else ""
        recompute = share(point.recompute_seconds, point.step_seconds)
        yield (
            f" {format_bytes(point.peak_bytes):>8}  {format_seconds(point.step_seconds):>8}  "
            f"{recompute:>6} {price}  {bar}"
        )


def _alternatives(plan: Plan, width: int) -> Iterator[str]:
    if not plan.alternatives:
        return
    yield "alternatives"
    for other in plan.alternatives:
        peak, step = format_bytes(other.peak_bytes), format_seconds(other.step_seconds)
        yield f" {peak:>8}  {step:>8}  {'fits' if other.fits else '    '}  {other.change}"


def _notes(plan: Plan, width: int) -> Iterator[str]:
    if not plan.notes:
        return
    yield "notes"
    for note in plan.notes:
        yield from textwrap.wrap(
            printable(note), width, initial_indent=" - ", subsequent_indent="   "
        )


def _shorten(text: str, width: int) -> str:
    """Cut in the middle: the ends name the part of the model and the operator."""
    if len(text) <= width:
        return text
    kept = width - 3
    return f"{text[: kept // 2]}...{text[len(text) - kept + kept // 2 :]}"


def _end(text: str, width: int) -> str:
    """Cut at the start: the end of a module's name tells modules apart."""
    return text if len(text) <= width else f"...{text[3 - width :]}"


def _clip(text: str, width: int) -> str:
    text = printable(text).rstrip()
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
