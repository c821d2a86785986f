"""The ranks of one pipeline: those that differ along "pp" alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fxzero.failures import Transfer, TransferError
from fxzero.groups import make_group
from fxzero.mesh import Mesh


@dataclass(frozen=True)
class Line:
    """One pipeline, as one of its ranks sees it.

    Attributes:
        members: the global rank of each place.
        rank: this process's place.
        group: a process group of theirs; None where there is one rank.
        back: another one.  What goes to earlier places goes over it: where messages run in the
            order in which they were started, the two directions would wait for each other.
        some: process groups of some of them, by their places.
    """

    members: tuple[int, ...] = (0,)
    rank: int = 0
    group: Any = None
    back: Any = None
    some: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh: Mesh) -> Line:
        """The pipeline that this process belongs to."""
        if "pp" not in mesh.sizes:
            return cls()
        members = tuple(dist.get_process_group_ranks(mesh.devices.get_group("pp")))
        # The mesh's group is the user's, and a rank that fails ends those in use.
        group, back = make_group(members), make_group(members)
        return cls(members, members.index(dist.get_rank()), group, back)

    @staticmethod
    def all_of(mesh: Mesh) -> list[list[int]]:
        """The global ranks of every pipeline of a mesh."""
        if "pp" not in mesh.sizes:
            return []
        ranks: torch.Tensor = mesh.devices.mesh
        along = mesh.devices.mesh_dim_names.index("pp")
        lines: list[list[int]] = ranks.movedim(along, -1).reshape(-1, mesh.sizes["pp"]).tolist()
        return lines

    def between(self, source: int, target: int) -> Any:
        """The process group of messages from one place to another."""
        return self.group if source < target else self.back

    @property
    def groups(self) -> tuple[Any, ...]:
        """All process groups of its own that this process is in."""
        return (self.group, self.back, *self.some.values()) if self.size > 1 else ()

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return len(self.members)

    def connect(self, places: tuple[int, ...]) -> None:
        """Makes a process group of some ranks, all of which call this; others may."""
        if places not in self.some and self.rank in places:
            self.some[places] = make_group([self.members[place] for place in places])

    def add_up(self, tensor: torch.Tensor, places: tuple[int, ...] | None = None) -> None:
        """Sums a tensor over all ranks, or over some that have called ``connect``, in place."""
        if self.size > 1:
            try:
                dist.all_reduce(tensor, group=self.group if places is None else self.some[places])
            except RuntimeError as error:
                what = "sum over " + ("the stages" if places is None else "copies of a weight")
                raise self._failed(what, tensor, error, places) from error

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks' tensors, which have one shape."""
        if self.size == 1:
            return tensor
        every = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in self.members
        ]
        try:
            dist.all_gather(every, tensor.contiguous(), group=self.group)
        except RuntimeError as error:
            raise self._failed("gather of the stages' batches", tensor, error) from error
        return torch.cat(every)

    def tell(self, tensor: torch.Tensor, place: int) -> torch.Tensor:
        """The tensor of one rank, on all."""
        if self.size > 1:
            try:
                dist.broadcast(tensor, self.members[place], group=self.group)
            except RuntimeError as error:
                raise self._failed("broadcast of the loss", tensor, error) from error
        return tensor

    def _failed(
        self,
        what: str,
        tensor: torch.Tensor,
        error: RuntimeError,
        places: tuple[int, ...] | None = None,
    ) -> TransferError:
        members = self.members if places is None else [self.members[place] for place in places]
        return TransferError(Transfer(what, tensor.nbytes, "pp", members), error)
