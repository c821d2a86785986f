"""Homes: where an optimizer that needs whole matrices computes, while each rank keeps rows of each.

Every matrix has one rank as its home.  All ranks send there their rows of it, and of what else the
work needs, the home computes from the whole, and sends each rank its rows of what came out.  Both
ways are one all-to-all of bytes for a turn, in which every rank is home to one matrix, or to some
small ones:

    2 ranks, matrices a b c; a is the largest        rank 0          rank 1
    first turn    rows arrive, rows leave            a, whole        b, whole
    second turn                                                      c, whole

Nothing stays at a home after its turn, so that states are cut as parameters are, and what a matrix
comes to does not depend on the number of ranks: its home sees the same whole one on any.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxzero.errors import DivergenceError, UsageError
from fxzero.sharding import padded_rows

# Elements that a home takes in a turn, unless a single matrix has more.
TURN_ELEMENTS = 2**20
_ABSENT, _USABLE, _UNUSABLE = range(3)
Sizes = list[list[int]]


@dataclass(frozen=True)
class Cut:
    """How some ranks share the rows of their matrices.

    Attributes:
        mesh: the ranks.
        dimension: of the mesh, along which rows are cut.
    """

    mesh: DeviceMesh
    dimension: int

    @property
    def group(self) -> Any:
        """The processes that have rows of one matrix."""
        return self.mesh.get_group(self.dimension)

    @property
    def ranks(self) -> int:
        """How many they are."""
        return self.mesh.size(self.dimension)

    @property
    def rank(self) -> int:
        """This one's number among them."""
        return self.mesh.get_local_rank(self.dimension)

    def rows(self, total: int) -> list[int]:
        """Rows that each rank has of so many."""
        each = padded_rows(total, self.ranks)
        return [max(min(each, total - rank * each), 0) for rank in range(self.ranks)]


def cut_of(parameter: Tensor) -> Cut | None:
    """How a parameter is cut over ranks; None: each has all of it.

    Raises:
        UsageError: it is cut in another way than along its rows, over one dimension of a mesh.
    """
    if not isinstance(parameter, DTensor):
        return None
    cut = [i for i, p in enumerate(parameter.placements) if not isinstance(p, Replicate)]
    if not cut:
        return None
    if len(cut) > 1 or parameter.placements[cut[0]] != Shard(0):
        raise UsageError(
            f"a parameter of shape {list(parameter.shape)} is spread over ranks as "
            f"{parameter.placements}; an optimizer of whole matrices takes those that are whole, "
            "or cut into rows over one dimension of a mesh"
        )
    found = Cut(parameter.device_mesh, cut[0])
    return found if found.ranks > 1 else None


def choose_homes(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank the numbers of its matrices: the dearest first, to the rank with least to do.

    Args:
        costs: of the matrices, integers, so that all ranks come to the same.
    """
    loads, homes = [0] * ranks, [list[int]() for _ in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        home = loads.index(min(loads))
        loads[home] += costs[number]
        homes[home].append(number)
    return homes


def turns(homes: Sequence[Sequence[int]], sizes: Sequence[int], most: int) -> Iterator[Sizes]:
    """For each turn, and each rank in it, the numbers of the matrices that it is home to.

    Args:
        sizes: of the matrices, in elements.
        most: elements of a rank's matrices in a turn, if they are more than one.
    """
    waiting = [list(reversed(own)) for own in homes]
    while any(waiting):
        yield [_next_of(own, sizes, most) for own in waiting]


def _next_of(waiting: list[int], sizes: Sequence[int], most: int) -> list[int]:
    taken: list[int] = []
    while waiting and (not taken or sum(sizes[n] for n in [*taken, waiting[-1]]) <= most):
        taken.append(waiting.pop())
    return taken


@dataclass(frozen=True)
class Share:
    """A tensor that the ranks of a cut share, each with some rows of it.

    Attributes:
        shape: of all rows.
        returns: whether its home sends rows back.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    returns: bool = True

    def sizes(self, cut: Cut) -> list[int]:
        """Bytes of the rows that each rank has."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return [rows * row for rows in cut.rows(self.shape[0])]

    def joined(self, pieces: Sequence[Tensor], rows: int) -> Tensor:
        """Rows from their bytes, in memory of their own: what has arrived may not be aligned."""
        return torch.cat(list(pieces)).view(self.dtype).view(rows, *self.shape[1:])


class Homed(Protocol):
    """A parameter whose update takes a part of work that needs all of it."""

    @property
    def parameter(self) -> Tensor: ...

    @property
    def cost(self) -> int:
        """Of the work, an integer that is the same on all ranks."""
        ...

    @property
    def shares(self) -> Sequence[Share]:
        """What goes to the home."""
        ...

    def send(self) -> Sequence[Tensor]:
        """This rank's rows of each share."""
        ...

    def work(self, wholes: list[Tensor]) -> Sequence[Tensor]:
        """From all shares, which it may overwrite, those that return."""
        ...

    def receive(self, rows: Sequence[Tensor]) -> None:
        """Takes this rank's rows of what returned."""
        ...


def at_homes(cut: Cut, homed: Sequence[Homed]) -> None:
    """Does the work of some parameters, each whole at its home; all ranks call it.

    Args:
        homed: those of one cut, in the same order on all ranks.
    """
    homes = choose_homes([h.cost for h in homed], cut.ranks)
    for turn in turns(homes, [h.parameter.numel() for h in homed], TURN_ELEMENTS):
        _take_turn(cut, [[homed[n] for n in own] for own in turn])


def _take_turn(cut: Cut, turn: Sequence[Sequence[Homed]]) -> None:
    """Does the work of the parameters of each rank."""
    mine = turn[cut.rank]
    shares = [share for homed in mine for share in homed.shares]
    leaving = [[_bytes(part) for homed in own for part in homed.send()] for own in turn]
    coming = [[share.sizes(cut)[rank] for share in shares] for rank in range(cut.ranks)]
    arrived = _exchange(leaving, coming, cut)
    wholes = deque(s.joined(p, s.shape[0]) for s, *p in zip(shares, *arrived, strict=True))
    del arrived
    results: list[Tensor] = []
    for homed in mine:
        results += homed.work([wholes.popleft() for _ in homed.shares])
    cuts = [whole.split(cut.rows(len(whole))) for whole in results]
    leaving = [[_bytes(parts[rank]) for parts in cuts] for rank in range(cut.ranks)]
    del results, cuts
    returning = [[[s for s in homed.shares if s.returns] for homed in own] for own in turn]
    coming = [[s.sizes(cut)[cut.rank] for own in rank for s in own] for rank in returning]
    returned = _exchange(leaving, coming, cut)
    for own, whose, parts in zip(turn, returning, returned, strict=True):
        pieces = iter(parts)
        for homed, back in zip(own, whose, strict=True):
            homed.receive([s.joined([next(pieces)], cut.rows(s.shape[0])[cut.rank]) for s in back])


def _bytes(part: Tensor) -> Tensor:
    return part.reshape(-1).view(torch.uint8)


def _exchange(leaving: list[list[Tensor]], coming: Sizes, cut: Cut) -> list[list[Tensor]]:
    """Bytes that each rank has sent to this one, in pieces of the sizes that are coming.

    Args:
        leaving: bytes for each rank, dropped from the list when they have been read.
    """
    sent = [sum(len(part) for part in own) for own in leaving]
    received = [sum(sizes) for sizes in coming]
    # A rank that is home to nothing in this turn sends nothing.
    nothing = torch.empty(0, dtype=torch.uint8, device=cut.mesh.device_type)
    flat = torch.cat([nothing, *(part for own in leaving for part in own)])
    leaving.clear()
    arrived = flat.new_empty(sum(received))
    dist.all_to_all_single(arrived, flat, received, sent, group=cut.group)
    pairs = zip(arrived.split(received), coming, strict=True)
    return [list(own.split(sizes)) if sizes else [] for own, sizes in pairs]


def agree_on_gradients(cut: Cut, parameters: Sequence[Tensor]) -> list[int]:
    """Numbers of the parameters that have gradients, the same on all ranks; all call it.

    Raises:
        UsageError: a gradient is sparse, or spread over ranks in another way than its parameter.
        DivergenceError: some ranks have a gradient that others have not; on every rank.
    """
    mine = torch.tensor([_kind(p) for p in parameters], device=parameters[0].device)
    every = [torch.empty_like(mine) for _ in range(cut.ranks)]
    dist.all_gather(every, mine, group=cut.group)
    kinds = torch.stack(every).T.tolist()
    for parameter, of_ranks in zip(parameters, kinds, strict=True):
        if _UNUSABLE in of_ranks:
            refuse_gradient(parameter)
        if len(set(of_ranks)) > 1:
            have = ", ".join(str(rank) for rank, kind in enumerate(of_ranks) if kind)
            raise DivergenceError(
                f"of {cut.ranks} ranks that share a parameter of shape {list(parameter.shape)} "
                f"only rank {have} has a gradient of it; no weight was changed\n"
                "  a matrix is updated by all ranks together: give it a gradient on all, or on none"
            )
    return [n for n, of_ranks in enumerate(kinds) if of_ranks[0] == _USABLE]


def has_usable_gradient(parameter: Tensor) -> bool:
    """Whether a parameter that this rank has whole is to be updated.

    Raises:
        UsageError: its gradient is sparse.
    """
    kind = _kind(parameter)
    if kind == _UNUSABLE:
        refuse_gradient(parameter)
    return kind == _USABLE


def refuse_gradient(parameter: Tensor) -> None:
    """Raises the UsageError of a gradient that is not usable."""
    raise UsageError(
        f"the gradient of a parameter of shape {list(parameter.shape)} is sparse, or spread over "
        "ranks in another way than the parameter\n"
        "  make an nn.Embedding with sparse=False; redistribute a gradient that was set by hand"
    )


def _kind(parameter: Tensor) -> int:
    gradient = parameter.grad
    if gradient is None:
        return _ABSENT
    if gradient.layout is not torch.strided:
        return _UNUSABLE
    placements = [getattr(t, "placements", None) for t in (gradient, parameter)]
    return _USABLE if placements[0] == placements[1] else _UNUSABLE
