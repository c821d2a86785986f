"""What a pass may look at besides the graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxzero.mesh import Sharding
from fxzero.plans import Decisions


@dataclass(frozen=True)
class PassContext:
    """Decisions of the Plan.  Passes take their decisions from here and make none.

    Attributes:
        decisions: what to save and what to recompute where.
        device: "cpu" or "cuda": which random stream an operator draws from.
        writes_buffers: whether the graph updates buffers itself, or returns their new values.
        sharding: how parameters and gradients are spread over ranks.
        reduces: whether gradients are averaged over the ranks, or left for a later step to.
        accumulates: whether gradients are added to those that exist.
        gathers: whether the graph gathers parameters itself, or is given what a step has gathered
            for all of its micro-batches.
        updates: whether the optimizer takes gradients in the backward, which returns none.
    """

    decisions: Decisions = field(default_factory=Decisions)
    device: str = "cpu"
    writes_buffers: bool = True
    sharding: Sharding = field(default_factory=Sharding)
    reduces: bool = True
    accumulates: bool = False
    gathers: bool = True
    updates: bool = False
