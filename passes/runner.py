"""Runs passes over a graph: times them, checks and dumps what they leave, keeps what broke them.

Environment:
    FXZERO_SPEC=1     check the law of ``passes/spec.py`` before the first pass and after each
    FXZERO_DUMP=DIR   write the graph before and after each pass to DIR
    FXZERO_SKIP=...   passes to leave out, see ``passes/pipeline.py``

Invariant: a pass that fails, or breaks the law, ends in an InternalError that names a directory
from which ``fxzero replay`` runs the same passes over the same graph.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxzero.errors import InternalError
from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.listing import format_graph
from fxzero.passes.pipeline import PASSES, Pass
from fxzero.passes.reproducer import read_reproducer, write_reproducer
from fxzero.passes.spec import check_graph

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassReport:
    """What a pass did: its time, with that of the check that follows it, and the graph's size."""

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
    """The graph after all ``passes``, and a report for each of them; the one given stays as it is.

    Args:
        check: whether to check the graph's law; None: as the environment says.
        dump: directory for the graph's text around each pass; None: as the environment says.

    Raises:
        InternalError: a pass failed; a GraphLawError if it left a graph that breaks the law.
    """
    if check is None:
        check = checking()
    if dump is None and os.environ.get("FXZERO_DUMP"):
        dump = Path(os.environ["FXZERO_DUMP"])
    try:
        return _run(graph.copy(), context, passes, check=check, dump=dump)
    except InternalError as error:
        try:
            directory = write_reproducer(dump, graph, context, passes, error)
        except Exception as failure:
            error.add_note(f"no reproducer was written: {type(failure).__name__}: {failure}")
            raise error from error.__cause__
        raise error.with_reproducer(directory) from error.__cause__


def checking() -> bool:
    """Whether the environment asks for the law to be checked."""
    return os.environ.get("FXZERO_SPEC") == "1"


def replay(path: str | Path) -> str:
    """Runs a reproducer's passes with all checks on.

    Returns:
        "passes now" if nothing fails any more.

    Raises:
        InternalError: it fails, now too.
        PlanError: the directory holds no reproducer.
    """
    directory = Path(path)
    graph, context, passes = read_reproducer(directory)
    try:
        _run(graph, context, passes, check=True, dump=None)
    except InternalError as error:
        raise error.with_reproducer(directory) from error.__cause__
    return "passes now"


def _run(
    graph: TrainGraph,
    context: PassContext,
    passes: Sequence[Pass],
    *,
    check: bool,
    dump: Path | None,
) -> tuple[TrainGraph, tuple[PassReport, ...]]:
    if check:
        check_graph(graph, stage="traced", when="before the first pass")
    reports = []
    for number, item in enumerate(passes):
        text = format_graph(graph) if dump else ""
        start, before = time.perf_counter(), len(graph.graph.nodes)
        graph = _apply(item, graph, context)
        if dump:
            _dump(dump, f"{number:02d}-{item.name}", text, format_graph(graph))
        if check:
            last = number == len(passes) - 1
            stage = "scheduled" if last else "traced"
            check_graph(graph, stage=stage, when=f"after pass {item.name}")
        seconds, after = time.perf_counter() - start, len(graph.graph.nodes)
        reports.append(PassReport(item.name, seconds, before, after))
        log.debug("%s: %.3f s, %d -> %d nodes", item.name, seconds, before, after)
    return graph, tuple(reports)


def _apply(item: Pass, graph: TrainGraph, context: PassContext) -> TrainGraph:
    try:
        return item.function(graph, context)
    except Exception as error:
        message = f"pass {item.name} failed: {type(error).__name__}: {error}"
        raise InternalError(message) from error


def _dump(directory: Path, name: str, before: str, after: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.before.txt").write_text(before)
    if after != before:
        (directory / f"{name}.after.txt").write_text(after)
