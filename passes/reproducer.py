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
import os
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxzero.errors import PlanError
from fxzero.graph import TrainGraph
from fxzero.passes import pipeline
from fxzero.passes.context import PassContext
from fxzero.passes.pipeline import Pass
from fxzero.passes.serialize import dump_graph, load_graph
from fxzero.plans import read_value

_MAX_FILE_BYTES = 1 << 30


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
    context = read_value(PassContext, _read_json(directory / "context.json"), "context")
    known = {item.name: item for item in (*pipeline.PREPARATION, *pipeline.PASSES)}
    names = read_value(tuple[str, ...], _read_json(directory / "passes.json"), "passes")
    if unknown := [name for name in names if name not in known]:
        raise PlanError(f"unknown passes {', '.join(unknown)}\n  known: {', '.join(known)}")
    graph = load_graph(_read_json(directory / "graph.json"))
    return graph, context, tuple(known[name] for name in names)


def _read_json(path: Path) -> Any:
    try:
        if os.path.getsize(path) > _MAX_FILE_BYTES:
            raise PlanError(f"{path} is larger than a reproducer can be")
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read {path}: {error}") from None
