"""A directory from which a failed run of the passes can be run again.

    graph.json     the graph before the first pass
    context.json   the decisions and the device
    passes.json    the passes, by name
    error.txt      the traceback

Only data is written and only data is read: a reproducer may come from a stranger.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fxzero.documents import beside, naming, read_json, shortened
from fxzero.errors import PlanError
from fxzero.graph import TrainGraph
from fxzero.passes import pipeline
from fxzero.passes.context import PassContext
from fxzero.passes.pipeline import Pass
from fxzero.passes.serialize import dump_graph, load_graph
from fxzero.typed_data import read_value

# The graph of Llama 3 8B has 13 MB, 1.7 kB for each of 7,862 nodes; others have more layers.
_MAX_FILE_BYTES = 2**27


T = TypeVar("T")


def write_reproducer(
    parent: Path | None,
    graph: TrainGraph,
    context: PassContext,
    passes: Sequence[Pass],
    error: Exception,
) -> Path:
    """Writes the directory, ``parent``/reproducer or a temporary one, and returns it."""
    if parent is None:
        directory = Path(tempfile.mkdtemp(prefix="fxzero-reproducer-"))
    else:
        directory = parent / "reproducer"
        directory.mkdir(parents=True, exist_ok=True)
    (directory / "error.txt").write_text("".join(traceback.format_exception(error)))
    contents = {
        "passes": [item.name for item in passes],
        "context": dataclasses.asdict(context),
        "graph": dump_graph(graph),
    }
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content, allow_nan=False))
    return directory


def read_reproducer(directory: Path) -> tuple[TrainGraph, PassContext, tuple[Pass, ...]]:
    """What ``write_reproducer`` wrote.

    Raises:
        PlanError: a file is missing or holds anything else.
    """
    context = _read(directory, "context", lambda data: read_value(PassContext, data, "context"))
    passes = _read(directory, "passes", _known_passes)
    return _read(directory, "graph", load_graph), context, passes


def _read(directory: Path, name: str, made: Callable[[Any], T]) -> T:
    """What is made of a file's document."""
    path = beside(directory / "error.txt", f"{name}.json", PlanError)
    data = read_json(path, _MAX_FILE_BYTES, PlanError)
    with naming(path, PlanError):
        return made(data)


def _known_passes(data: Any) -> tuple[Pass, ...]:
    known = {item.name: item for item in (*pipeline.PREPARATION, *pipeline.PASSES)}
    names = read_value(tuple[str, ...], data, "passes")
    if unknown := [name for name in names if name not in known]:
        some = ", ".join(map(shortened, unknown[:5]))
        raise PlanError(f"unknown passes {some}\n  known: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise PlanError(f"{len(names)} passes, of which only {len(set(names))} are different")
    return tuple(known[name] for name in names)
