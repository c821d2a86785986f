"""What a search found, as text: the best way, those that come close, and why they lost.

70.6 B parameters on 512 x h100-sxm-80gb, 1024 examples a step
fastest: pp 4 x dp 128, ZeRO 2, 1f1b, 8 x 1 ...
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fxzero.cluster.search import devices_of
from fxzero.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from fxzero.cluster.estimate import Estimate
    from fxzero.cluster.search import Found

_SHOWN = 12
_WIDTH = 160
_ADVICE = "more devices, shorter inputs, a smaller model, or offload=True"
_BEST = {
    "time": "fastest",
    "devices": "fewest devices",
    "batch": "largest batch",
    "cost": "cheapest",
}


def render(found: Found, shown: int = _SHOWN) -> str:
    """The report.

    Args:
        shown: how many ways it lists.
    """
    question, best = found.question, found.best
    fitting = sum(estimate.fits for estimate in found.ranked)
    budget = question.options.memory_budget
    room = "any memory" if budget is None else f"{format_bytes(budget)} of memory each"
    lines = [
        f"{question.name} on {question.devices} x {question.hardware.name}, {room}: "
        f"{len(found.ranked)} ways, of which {fitting} fit",
        _verdict(found),
        "",
        _table(found, shown),
        "",
        *_assumptions(found),
    ]
    if not best.fits:
        lines.insert(2, f"to fit: {_ADVICE}")
    return "\n".join(lines)


def to_json(found: Found) -> str:
    """All ways as JSON: seconds, bytes, and what a step is made of."""
    question = found.question
    rows = [
        {
            **dataclasses.asdict(estimate),
            "optimizer": str(question.optimizers[estimate.way.optimizer]),
            "devices": devices_of(estimate.way),
            "examples": found.examples(estimate),
            "cost": found.cost(estimate),
            "reason": found.reason(estimate),
        }
        for estimate in found.ranked
    ]
    asked = {
        "model": question.name,
        "hardware": question.hardware.name,
        "devices": question.devices,
        "global_batch": question.global_batch,
        "goal": question.goal,
        "memory_budget": question.options.memory_budget,
    }
    return json.dumps({"question": asked, "ways": rows}, indent=1) + "\n"


def _verdict(found: Found) -> str:
    best, goal = found.best, found.question.goal
    if not best.fits:
        need = format_bytes(best.required_bytes)
        return f"DOES NOT FIT: the way that needs least, {best.way}, needs {need}"
    examples = found.examples(best)
    text = (
        f"{_BEST[goal]}: {best.way} on {_devices(best)}, {examples} examples in "
        f"{format_seconds(best.seconds)} ({examples / best.seconds:.4g} a second), peak "
        f"{format_bytes(best.peak_bytes)}"
    )
    cost = found.cost(best)
    return text if cost is None else f"{text}, {cost:.4g} for a step"


def _devices(estimate: Estimate) -> str:
    count = devices_of(estimate.way)
    return "1 device" if count == 1 else f"{count} devices"


def _table(found: Found, shown: int) -> str:
    table = Table(box=None, pad_edge=False, header_style="none")
    priced = found.question.price is not None
    heads = ["way", "step", "of best", "peak", "recompute", "links", "bubble"]
    for head in (*heads, *(("cost",) if priced else ()), "more than the best"):
        table.add_column(head, justify="left" if head in ("way", "more than the best") else "right")
    for estimate in found.ranked[:shown]:
        table.add_row(*_cells(found, estimate, priced))
    console = Console(width=_WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _cells(found: Found, estimate: Estimate, priced: bool) -> list[str]:
    shares = (estimate.recompute, estimate.links, estimate.bubble)
    cells = [
        str(estimate.way),
        format_seconds(estimate.seconds),
        f"{estimate.seconds / found.best.seconds:.2f}",
        format_bytes(estimate.peak_bytes if estimate.fits else estimate.required_bytes),
        *(f"{part / estimate.seconds:.1%}" for part in shares),
    ]
    if priced:
        cells.append(f"{found.cost(estimate):.4g}")
    return [*cells, found.reason(estimate)]


def _assumptions(found: Found) -> list[str]:
    notes = [
        "estimates from one trace: times and activations grow with the micro-batch in proportion; "
        "found.plan() plans a way in full",
        *found.question.hardware.assumptions(),
    ]
    return [f"- {note}" for note in notes]
