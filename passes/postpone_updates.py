"""Updates in the backward wait for what other passes let read weights again.

A value that is recomputed for a late read may need a weight whose gradient is complete already.

Invariant: nothing reads a weight behind its update.

    done = update(w, dw, "w")                  h' = mm(x, w)
    h' = mm(x, w); m' = gt(h', 0)     ->       done = update(w, dw, "w")
    dz = mul(dy, m')                           m' = gt(h', 0); dz = mul(dy, m')
"""

from __future__ import annotations

from fxzero.graph import TrainGraph
from fxzero.passes.context import PassContext
from fxzero.passes.update import postpone_updates


def postpone_updates_pass(graph: TrainGraph, context: PassContext) -> TrainGraph:
    """Moves updates behind the last operator that reads their weights."""
    if context.updates:
        postpone_updates(graph)
        graph.graph.lint()
    return graph
