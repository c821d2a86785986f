"""Homes: where an optimizer that needs whole matrices computes, while each rank keeps rows of each.

Every matrix has one rank as its home.  All ranks send their rows of it there, the home computes
from the whole, and sends each rank its rows of what came out.  Both ways are one all-to-all for a
turn, in which every rank is home to one matrix, or to some small ones:

    2 ranks, matrices a b c; a is the largest        rank 0          rank 1
    first turn    rows arrive, rows leave            a, whole        b, whole
    second turn                                                      c, whole

Nothing stays at a home after its turn, so that states are cut as parameters are, and what a matrix
comes to does not depend on the number of ranks: its home sees the same whole one on any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxzero.errors import DivergenceError, UsageError
from fxzero.optim.arenas import local
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

    def rows(self, matrix: Tensor) -> list[int]:
        """Rows of a matrix that each rank has."""
        each = padded_rows(matrix.shape[0], self.ranks)
        return [max(min(each, matrix.shape[0] - rank * each), 0) for rank in range(self.ranks)]


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


class Homed(Protocol):
    """A matrix whose update takes a part of work that needs all of it."""

    @property
    def parameter(self) -> Tensor: ...

    @property
    def cost(self) -> int:
        """Of the work, an integer that is the same on all ranks."""
        ...

    def send(self) -> Tensor:
        """This rank's rows of what the work needs, in a dtype that all matrices share."""
        ...

    def work(self, whole: Tensor) -> Tensor:
        """From all rows of what was sent what rows are sent back of, of its shape and dtype."""
        ...

    def receive(self, rows: Tensor) -> None:
        """Takes this rank's rows of what came out."""
        ...


def at_homes(cut: Cut, matrices: Sequence[Homed]) -> None:
    """Does the work of some matrices, each whole at its home; all ranks call it.

    Args:
        matrices: those of one cut, in the same order on all ranks.
    """
    homes = choose_homes([m.cost for m in matrices], cut.ranks)
    for turn in turns(homes, [m.parameter.numel() for m in matrices], TURN_ELEMENTS):
        _take_turn(cut, [[matrices[n] for n in own] for own in turn])


def _take_turn(cut: Cut, turn: Sequence[Sequence[Homed]]) -> None:
    """Does the work of the matrices of each rank."""
    everyone, mine = [m for own in turn for m in own], turn[cut.rank]
    here = [[_elements(cut, m)[cut.rank] for m in own] for own in turn]
    there = [[_elements(cut, m)[rank] for m in mine] for rank in range(cut.ranks)]
    rows = [m.send() for m in everyone]
    nothing = rows[0].new_empty(0)
    arrived = _exchange(rows, here, there, cut)
    results = []
    for place, matrix in enumerate(mine):
        whole = torch.cat([own[place] for own in arrived]).view(matrix.parameter.shape)
        results.append(matrix.work(whole).split(cut.rows(matrix.parameter)))
    del arrived
    # A rank that is home to no matrix in this turn sends nothing, of the same dtype.
    leaving = [nothing, *(result[rank] for rank in range(cut.ranks) for result in results)]
    del results
    returned = _exchange(leaving, there, here, cut)
    parts = (part for own in returned for part in own)
    for matrix, part in zip(everyone, parts, strict=True):
        matrix.receive(part.view(local(matrix.parameter).shape))


def _elements(cut: Cut, matrix: Homed) -> list[int]:
    """Elements of a matrix that each rank has."""
    columns = math.prod(matrix.parameter.shape[1:])
    return [rows * columns for rows in cut.rows(matrix.parameter)]


def _exchange(parts: list[Tensor], leaving: Sizes, coming: Sizes, cut: Cut) -> list[Any]:
    """What each rank has sent to this one, in pieces of the sizes that are coming.

    Args:
        parts: for the ranks one after the other; dropped from the list when they have been read.
    """
    sent, received = ([sum(sizes) for sizes in each] for each in (leaving, coming))
    flat = torch.cat([part.reshape(-1) for part in parts])
    parts.clear()
    arrived = flat.new_empty(sum(received))
    dist.all_to_all_single(arrived, flat, received, sent, group=cut.group)
    pairs = zip(arrived.split(received), coming, strict=True)
    return [own.split(sizes) if sizes else () for own, sizes in pairs]


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
