"""What users and their models have settled before the solver: tags on nodes.

Three sources, the later one wins: the ZeRO stage (keep what is gathered, or gather again), regions
of ``torch.utils.checkpoint`` (recompute what is inside), and the ``recompute`` option as a callable
on nodes.  The result names nodes, "save" or "recompute".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxzero.collectives import arrives_as, is_gather
from fxzero.errors import UsageError
from fxzero.graph import TrainGraph
from fxzero.solver.problem import is_recomputable
from fxzero.storages import analyse

# Share of all gathered bytes that the smallest parameters may keep in stage 3.
_SMALL_SHARE = 0.01

RecomputeOption = str | Callable[[fx.Node], Any]
MODES = ("auto", "none", "full")
_POLICIES = {
    CheckpointPolicy.MUST_SAVE: "save",
    CheckpointPolicy.PREFER_SAVE: None,
    CheckpointPolicy.MUST_RECOMPUTE: "recompute",
    CheckpointPolicy.PREFER_RECOMPUTE: None,
    "save": "save",
    "recompute": "recompute",
    None: None,
}


def check_recompute_option(recompute: object) -> None:
    """Raises UsageError unless ``recompute`` is a known mode or a callable."""
    if recompute not in MODES and not callable(recompute):
        raise UsageError(
            f"recompute={recompute!r} must be one of {', '.join(map(repr, MODES))}, or a function "
            'from a node to "save", "recompute" or None'
        )


def settled_nodes(
    graph: TrainGraph, recompute: RecomputeOption, zero: int | None = None
) -> dict[str, str]:
    """ "save" or "recompute" by name, for forward nodes that a tag or a user has settled."""
    settled = {} if zero is None else _gathered(graph, again=zero == 3)
    settled |= _checkpoint_regions(graph)
    if callable(recompute):
        for node in graph.graph.nodes:
            if node.op == "call_function" and not graph.is_backward(node):
                choice = _policy(recompute(node), node)
                if choice is not None:
                    settled[node.name] = choice
    return settled


def _gathered(graph: TrainGraph, *, again: bool) -> dict[str, str]:
    """What becomes of gathered parameters: kept, or gathered again but for the smallest.

    Gathering those costs a latency each and frees next to nothing.
    """
    gathers = [node for node in graph.graph.nodes if is_gather(node)]
    wholes = [arrives_as(gather) for gather in gathers]
    room = _SMALL_SHARE * sum(whole.meta["val"].nbytes for whole in wholes)
    settled = {}
    for gather, whole in sorted(
        zip(gathers, wholes, strict=True), key=lambda pair: pair[1].meta["val"].nbytes
    ):
        room -= whole.meta["val"].nbytes
        choice = "recompute" if again and room < 0 else "save"
        settled[whole.name] = choice
        if choice == "recompute":
            settled[gather.name] = choice
    return settled


def unmet_wishes(graph: TrainGraph, settled: Mapping[str, str]) -> list[str]:
    """A note on every value that was to be recomputed but whose operator may not run twice."""
    return [
        f"{node.name} is saved and not recomputed: {node.target} may not run twice"
        for node in graph.graph.nodes
        if settled.get(node.name) == "recompute"
        and node.target is not operator.getitem
        and not is_recomputable(node)
    ]


def name_of(node: fx.Node) -> str | None:
    """The name that ``fxzero.name`` gave to the node's value, which stands on an alias of it."""
    aliases = [user for user in node.users if user.target is torch.ops.aten.alias.default]
    for named in (node, *aliases):
        name: str | None = (named.meta.get("custom") or {}).get("fxzero_name")
        if name is not None:
            return name
    return None


def checkpoint_region(node: fx.Node) -> int | None:
    """Which ``torch.utils.checkpoint`` region the node belongs to, if any."""
    region: int | None = (node.meta.get("custom") or {}).get("fxzero_checkpoint")
    return region


def _checkpoint_regions(graph: TrainGraph) -> dict[str, str]:
    """Nodes whose memory a checkpoint region makes and no forward node outside of it reads.

    A view inside a region of what comes from outside, or an alias of what leaves it, is not among
    them: that memory is there anyway, and the next region starts from it.
    """
    storages = analyse(graph.graph.nodes)
    regions = [checkpoint_region(maker) for maker in storages.maker]
    inner = {storage for storage, region in enumerate(regions) if region is not None}
    forward = [node for node in graph.graph.nodes if not graph.is_backward(node)]
    for node in forward:
        read = {s for source in node.all_input_nodes for s in storages.of[source]}
        inner -= {s for s in read if regions[s] != checkpoint_region(node)}
    return {
        node.name: "recompute"
        for node in forward
        if (mine := storages.of.get(node)) and inner.issuperset(mine)
    }


def _policy(answer: Any, node: fx.Node) -> str | None:
    try:
        return _POLICIES[answer]
    except (KeyError, TypeError):
        raise UsageError(
            f"recompute(node) returned {answer!r} for {node.name}; expected "
            '"save", "recompute", None or a torch CheckpointPolicy'
        ) from None
