"""Collectives as they stand in graphs: torch's functional ones, with the mesh dimension's name.

    g = all_gather_into_tensor(part, 8, "dp"); w = wait_tensor(g)

``w`` is the memory of ``g`` once the transfer has ended; until then ``part`` is read.  ``bind``
puts the names of process groups in the place of dimensions' in graphs that are about to run, and
operators that gloo can run several of at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the operators
from torch import fx

from fxzero.messages import READ
from fxzero.storages import tensor_leaves

_OPERATORS = torch.ops._c10d_functional
ALL_GATHER = _OPERATORS.all_gather_into_tensor.default
ALL_REDUCE = _OPERATORS.all_reduce.default
ALL_TO_ALL = _OPERATORS.all_to_all_single.default
REDUCE_SCATTER = _OPERATORS.reduce_scatter_tensor.default
WAIT = _OPERATORS.wait_tensor.default

# Several at once, each with a list of tensors in the place of one.
COALESCED: dict[object, Any] = {
    ALL_GATHER: _OPERATORS.all_gather_into_tensor_coalesced.default,
    ALL_REDUCE: _OPERATORS.all_reduce_coalesced.default,
    REDUCE_SCATTER: _OPERATORS.reduce_scatter_tensor_coalesced.default,
}

# Position of the group's name among the arguments.
_GROUP: dict[object, int] = {ALL_GATHER: 2, ALL_REDUCE: 2, ALL_TO_ALL: 3, REDUCE_SCATTER: 3}
_RANKS: dict[object, int] = {ALL_GATHER: 1, REDUCE_SCATTER: 2}
_GROUP |= {COALESCED[one]: position for one, position in _GROUP.items() if one in COALESCED}
_RANKS |= {COALESCED[one]: position for one, position in _RANKS.items()}


def is_collective(node: fx.Node) -> bool:
    """Whether the node starts a collective."""
    return node.target in _GROUP


def is_gather(node: fx.Node) -> bool:
    """Whether the node starts an all-gather: it may run again, as all ranks run the same graph."""
    return node.target in (ALL_GATHER, COALESCED[ALL_GATHER])


def is_reduction(node: fx.Node) -> bool:
    """Whether the node starts a reduction, or the all-to-all that stands for one."""
    return is_collective(node) and not is_gather(node)


def starts_transfer(target: Any) -> bool:
    """Whether an operator is a collective, in a graph or in generated code."""
    name = getattr(target, "namespace", "")
    return target is OVER_GLOO or (name == WAIT.namespace and target is not WAIT)


def is_wait(node: fx.Node) -> bool:
    """Whether the node waits for a collective."""
    return node.target is WAIT


def waits_of(collective: fx.Node) -> list[fx.Node]:
    """The waits for a collective's results."""
    users = list(collective.users)
    parts = [user for item in users if item.target is operator.getitem for user in item.users]
    return [user for user in (*users, *parts) if is_wait(user)]


def arrives_as(gather: fx.Node) -> fx.Node:
    """The node whose value is what was gathered: the gather, or what is read from its message."""
    readers = [user for wait in waits_of(gather) for user in wait.users if user.target is READ]
    return readers[0] if readers else gather


def preparation(gather: fx.Node) -> tuple[fx.Node, ...]:
    """What is done to a parameter before it is gathered, the last first, and the parameter."""
    found: list[fx.Node] = []
    pending = list(gather.all_input_nodes)
    while pending:
        node = pending.pop()
        found.append(node)
        pending += node.all_input_nodes
    return tuple(found)


def collective_of(wait: fx.Node) -> fx.Node:
    """The collective that a wait is for."""
    (source,) = wait.all_input_nodes
    return source.all_input_nodes[0] if source.target is operator.getitem else source


def in_transfer(node: fx.Node) -> tuple[fx.Node, ...]:
    """What must stay as it is until a wait has ended: all that its collective reads."""
    return tuple(collective_of(node).all_input_nodes) if is_wait(node) else ()


def workspace_bytes(target: Any, read: Iterable[Any], made: Iterable[Any]) -> int:
    """What gloo allocates for itself while a collective runs; the copies that it makes are its own.

    Found by measuring: a gather makes its result twice, and all but a single all-reduce copy what
    they read.  NCCL's buffers are not the allocator's.

    Args:
        target: the operator, also one that writes into its argument.
        read, made: its tensors, which need no memory.
    """
    read, made = list(read), list(made)
    if any(tensor.device.type != "cpu" for tensor in made):
        return 0
    name = target.name()
    received, sent = (sum(int(tensor.nbytes) for tensor in tensors) for tensors in (made, read))
    if "all_gather" in name:
        return received
    return sent if "reduce_scatter" in name or "coalesced" in name else 0


def workspace_of(collective: fx.Node, device: str) -> int:
    """What a collective in a graph needs besides its tensors, in bytes.

    Args:
        device: what it will run on: graphs for CUDA devices may be traced on others.
    """
    if device != "cpu":
        return 0
    read = [source.meta["val"] for source in collective.all_input_nodes]
    return workspace_bytes(collective.target, read, tensor_leaves(collective.meta["val"]))


def ranks_of(node: fx.Node) -> int | None:
    """How many ranks take part in a collective; None where the operator does not say."""
    if node.target is ALL_TO_ALL:
        sizes = node.args[1]
        assert isinstance(sizes, (list, tuple))
        return len(sizes)
    position = _RANKS.get(node.target)
    ranks = None if position is None else node.args[position]
    assert ranks is None or isinstance(ranks, int)
    return ranks


def group_of(node: fx.Node) -> str:
    """The dimension (or process group) of a collective."""
    name = node.args[_GROUP[node.target]]
    assert isinstance(name, str)
    return name


def all_gather(part: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """The parts of all ranks, one after the other, at once and outside of graphs."""
    start = OVER_GLOO if part.device.type == "cpu" else ALL_GATHER
    gathered: torch.Tensor = WAIT(start(part.contiguous(), ranks, group))
    return gathered


def average(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """The average of all ranks' tensors."""
    reduced: torch.Tensor = WAIT(ALL_REDUCE(tensor, "avg", group))
    return reduced


def average_in_place(tensor: torch.Tensor, group: str) -> None:
    """``average`` into the tensor itself."""
    WAIT(_OPERATORS.all_reduce_.default(tensor, "avg", group))


def average_part(tensor: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """This rank's part of the average of all ranks' tensors."""
    reduced: torch.Tensor = WAIT(REDUCE_SCATTER(tensor, "avg", ranks, group))
    return reduced


@torch.library.custom_op("fxzero::all_gather_over_gloo", mutates_args=())
def _over_gloo(part: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Starts an all-gather as ALL_GATHER does.

    In torch 2.13 gloo's gather of a list, which ALL_GATHER calls with a list of one, corrupts the
    heap where several run at once; its gather into one tensor does not.
    """
    whole = part.new_empty((part.shape[0] * ranks, *part.shape[1:]))
    _OPERATORS.all_gather_into_tensor_out(part, ranks, group, out=whole)
    return whole


@_over_gloo.register_fake
def _(part: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    return part.new_empty((part.shape[0] * ranks, *part.shape[1:]))


OVER_GLOO = torch.ops.fxzero.all_gather_over_gloo.default


def bind(module: fx.GraphModule, groups: Mapping[str, str]) -> None:
    """Replaces names of mesh dimensions by those of process groups, in place."""
    for node in module.graph.nodes:
        if is_collective(node):
            position = _GROUP[node.target]
            node.update_arg(position, groups.get(group_of(node), group_of(node)))
            if node.target is ALL_GATHER and node.meta["val"].device.type == "cpu":
                node.target = OVER_GLOO
    module.recompile()
