"""Runs passes over a graph, times them and dumps what they changed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.listing import format_graph
from fxzero.passes.pipeline import PASSES, Pass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassReport:
    """What a pass did: its time, with that of the checks that follow it, and the graph's size."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int


def run_passes(
    graph: TrainGraph,
    context: PassContext,
    passes: Sequence[Pass] = PASSES,
    *,
    check: bool | None = None,
    dump: Path | None = None,
) -> tuple[TrainGraph, tuple[PassReport, ...]]:
    """The graph after all ``passes``, and a report for each of them."""
    if check is None:
        check = os.environ.get("FXZERO_SPEC") == "1"
    if dump is None and os.environ.get("FXZERO_DUMP"):
        dump = Path(os.environ["FXZERO_DUMP"])
    reports = []
    for number, item in enumerate(passes):
        start, before = time.perf_counter(), len(graph.graph.nodes)
        text = format_graph(graph) if dump else ""
        graph = item.function(graph, context)
        if dump:
            _dump(dump, f"{number:02d}-{item.name}", text, format_graph(graph))
        report = PassReport(item.name, time.perf_counter() - start, before, len(graph.graph.nodes))
        log.debug(
            "%s: %.3f s, %d nodes -> %d",
            report.name,
            report.seconds,
            report.nodes_before,
            report.nodes_after,
        )
        reports.append(report)
    return graph, tuple(reports)


def _dump(directory: Path, name: str, before: str, after: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.before.txt").write_text(before)
    if after != before:
        (directory / f"{name}.after.txt").write_text(after)
