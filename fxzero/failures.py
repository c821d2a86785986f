"""What ranks are told of a collective that failed: which one, of which step, and who is silent.

Nothing is recorded while collectives run.  An error in a graph carries a traceback, and that leads
to the line that was running, to the node that the line was written for, and to the parameters on
its other side; a message of a pipeline, a norm, or the barrier of a checkpoint is known where it is
waited for.

    step 3: a collective of rank 0 failed: reduce-scatter of the gradient of up.bias in the backward
      (node reduce_scatter_2, 96 bytes over dp with rank 1)
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import fx

from fxzero import _torch
from fxzero.collectives import (
    ALL_REDUCE,
    ALL_TO_ALL,
    COALESCED,
    REDUCE_SCATTER,
    collective_of,
    group_of,
    is_collective,
    is_gather,
    is_wait,
)
from fxzero.errors import FxzeroError, PeerError, first_line, listed
from fxzero.execution import source_of
from fxzero.groups import close_group
from fxzero.storages import tensor_leaves
from fxzero.updating import UPDATE

if TYPE_CHECKING:
    from fxzero.mesh import Mesh
    from fxzero.passes.partition import Split

log = logging.getLogger(__name__)

# Seconds in which ranks are to notice a failure that one of them has noticed: where a connection is
# closed, all hear of it one after the other; where time is up, it is up for all.
_ANSWER = 1.0
_ANSWER_TO_SILENCE = 0.5
# What the errors of failed collectives say.
_OF_COLLECTIVES = ("gloo", "Gloo", "NCCL", "onnection", "imed out", "Broken pipe", "pair closure")
# And those of waits that took too long; the second is of transfers that were under way besides.
_OF_SILENCE = ("imed out", "imeout caused pair closure")
_NAMES: dict[object, str] = {
    ALL_REDUCE: "all-reduce",
    COALESCED[ALL_REDUCE]: "all-reduce",
    REDUCE_SCATTER: "reduce-scatter",
    COALESCED[REDUCE_SCATTER]: "reduce-scatter",
    ALL_TO_ALL: "all-to-all",
}
# The comment of generated code above a call.
_WRITTEN_FOR = re.compile(r"# Topologically Sorted Source Nodes: \[([\w, ]*)\]")
_SHOWN = 3  # parameters of a bucket


@dataclass(frozen=True)
class Transfer:
    """One collective, or one message, in words.

    Attributes:
        what: "gather of the parameter up.weight in the forward".
        bytes: of what arrives.
        over: the mesh's dimension, or who they are: "dp", "all ranks".
        peers: the global ranks that take part, this one among them or not.
        node: its name in the graph; "" outside of graphs.
    """

    what: str
    bytes: int
    over: str
    peers: Sequence[int]
    node: str = ""

    def in_words(self, rank: int) -> str:
        """It, as a rank sees it."""
        node = f"node {self.node}, " if self.node else ""
        peers = ", ".join(str(peer) for peer in self.peers if peer != rank)
        return f"{self.what} ({node}{self.bytes:,} bytes over {self.over} with rank {peers})"


class TransferError(RuntimeError):
    """The error of a collective, and which one it is; ``Peers.explained`` makes the most of it."""

    def __init__(self, transfer: Transfer, original: RuntimeError) -> None:
        super().__init__(str(original))
        self.transfer = transfer
        self.original = original


class Peers:
    """Ranks that train together over a group of gloo, for all that is not a tensor of a graph.

    Attributes:
        ranks: their global ranks.
        rank: this process's.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.store = _torch.default_store()

    def explained(self, error: RuntimeError, when: str) -> RuntimeError:
        """A PeerError for an error of a collective, other errors as they are.

        It says what a rank said that has left.  If none has, every rank that notices leaves a mark
        in the store; who leaves none in time is named.  What torch says comes last.
        """
        transfer = error.transfer if isinstance(error, TransferError) else None
        original = error.original if isinstance(error, TransferError) else error
        text = first_line(original)
        if isinstance(original, FxzeroError) or not any(word in text for word in _OF_COLLECTIVES):
            return original
        which = "" if transfer is None else f": {transfer.in_words(self.rank)}"
        what = f"a collective of rank {self.rank} failed{which}"
        lines = [f"{when}: {what}"]
        # A launcher may end this process before the others have answered.
        log.error("%s: %s", lines[0], text)
        is_late = any(word in text for word in _OF_SILENCE)
        patience = _ANSWER_TO_SILENCE if is_late else _ANSWER
        try:
            said = self._said()
            silent = [] if said else self._silent(when, patience)
        except RuntimeError as problem:
            lines.append(f"  the others cannot be asked: {first_line(problem)}")
        else:
            if said:
                lines = [f"{when}: {said[0]}", *(f"  {other}" for other in said[1:]), f"  {what}"]
            else:
                names = ", ".join(map(str, silent)) or "none"
                lines.append(
                    f"  no word within {patience:g} s from rank {names}: "
                    "gone, stuck, or waiting for one"
                )
        lines.append("  restart all ranks, from the last checkpoint (torchrun --max-restarts)")
        lines.append(f"  torch says: {text}")
        return PeerError("\n".join(lines))

    def leave(self, error: BaseException, where: str, groups: Sequence[Any] = ()) -> None:
        """Tells all ranks why this one does not go on, and ends groups in which they wait for it.

        They notice in ``explained``, and leave, too: others may wait for them.

        Args:
            where: what this rank was doing, such as "step 2".
        """
        if not isinstance(error, PeerError):
            text = f"rank {self.rank} failed in {where}: {type(error).__name__}: "
            with contextlib.suppress(RuntimeError):  # whoever had the store may be gone
                self.store.set(self._place(self.rank), text + first_line(error))
        for group in (*groups, self.group):
            close_group(group)

    def _place(self, rank: int) -> str:
        """Where a rank says why it has left."""
        return f"fxzero left {self.group.group_name} {rank}"

    def _said(self) -> list[str]:
        """What ranks say that have left."""
        places = [self._place(rank) for rank in self.ranks]
        return [self.store.get(place).decode() for place in places if self.store.check([place])]

    def _silent(self, when: str, patience: float) -> list[int]:
        """Ranks that do not notice, too, that something failed."""
        name = self.group.group_name
        keys = {rank: f"fxzero failed {name} {when} {rank}" for rank in self.ranks}
        self.store.set(keys[self.rank], "1")
        end = time.monotonic() + patience
        while True:
            silent = [rank for rank, key in keys.items() if not self.store.check([key])]
            if not silent or time.monotonic() > end:
                return silent
            time.sleep(0.05)


def named(error: RuntimeError, split: Split, mesh: Mesh) -> RuntimeError:
    """An error in a step's graphs as that of one of their collectives, if it is one.

    Args:
        split: the graphs that ran, with names of the mesh's dimensions.
        mesh: the ranks that ran them.
    """
    for name in _running(error):
        for module, where in ((split.forward, "forward"), (split.backward, "backward")):
            node = next((n for n in module.graph.nodes if n.name == name), None)
            if node is not None and (is_wait(node) or is_collective(node)):
                collective = collective_of(node) if is_wait(node) else node
                return TransferError(_described(collective, split, where, mesh), error)
    return error


def _running(error: BaseException) -> Iterator[str]:
    """Names of nodes whose code was running when an error was raised, the innermost first."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    for trace in reversed(frames):
        code, number = trace.tb_frame.f_code, trace.tb_lineno
        if (source := source_of(trace.tb_frame)) is not None:
            yield source.splitlines()[number - 1].split(" = ")[0].strip()
        elif found := _WRITTEN_FOR.search(linecache.getline(code.co_filename, number - 1)):
            yield from found[1].split(", ")


def _described(collective: fx.Node, split: Split, where: str, mesh: Mesh) -> Transfer:
    if is_gather(collective):
        names, kind, operator = _gathered(collective, split), "parameter", "gather"
    else:
        names, kind = _reduced(collective, split), "gradient"
        operator = _NAMES[collective.target]
    what = f"{operator} of {_bucket(kind, names)}" if names else operator
    return Transfer(
        f"{what} in the {where}",
        sum(int(tensor.nbytes) for tensor in tensor_leaves(collective.meta["val"])),
        group_of(collective),
        mesh.members(group_of(collective)),
        collective.name,
    )


def _bucket(kind: str, names: Sequence[str]) -> str:
    """ "the gradients of a, b, c and 4 more"."""
    of = "of " if kind == "gradient" else ""
    return f"the {kind}{'s' if len(names) > 1 else ''} {of}{listed(names, _SHOWN)}"


def _gathered(gather: fx.Node, split: Split) -> list[str]:
    """The parameters whose parts a gather moves."""
    forward = {node.name: node for node in split.forward.graph.nodes}
    placeholders = split.forward.graph.find_nodes(op="placeholder")
    roles = {n.name: role for n, role in zip(placeholders, split.inputs, strict=True)}
    found: dict[str, None] = {}
    pending, seen = [gather], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += reversed(node.all_input_nodes)
        if node.op == "placeholder" and node.name in roles:
            found[roles[node.name].name] = None
        elif node.op == "placeholder" and node.name in forward:
            pending.append(forward[node.name])  # the forward has made it
    return list(found)


def _reduced(reduction: fx.Node, split: Split) -> list[str]:
    """The parameters whose gradients a reduction averages."""
    of = {at: role.name for role, at in zip(split.inputs, split.gradients, strict=True)}
    found: dict[str, None] = {}
    pending, seen = [reduction], {reduction}
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if user.target is UPDATE:
                found[str(user.args[2])] = None
            elif user.op == "output":
                results: Any = user.args[0]
                places = [at for at, result in enumerate(results) if result is node]
                found.update((of[at], None) for at in places if at in of)
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return list(found)
