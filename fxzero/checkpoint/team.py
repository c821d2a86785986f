"""The processes that save or load together, or the one that does it alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fxzero import _torch
from fxzero.errors import CheckpointError, FxzeroError
from fxzero.failures import Peers, Transfer, TransferError
from fxzero.groups import PATIENCE

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """All processes of the default group.

    Attributes:
        peers: they, for what they tell each other besides tensors; None if there is only one.
        doing: what they do together, for errors.
    """

    rank: int
    size: int
    peers: Peers | None
    doing: str

    @classmethod
    def of_all(cls, doing: str) -> Team:
        """Every process; they have to call it together."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, 1, None, doing)
        peers = Peers(dist.new_group(backend="gloo", timeout=PATIENCE))
        return cls(dist.get_rank(), dist.get_world_size(), peers, doing)

    @property
    def group(self) -> Any:
        """Over gloo; None if there is only one process."""
        return None if self.peers is None else self.peers.group

    @property
    def leads(self) -> bool:
        """Whether this process does what one has to do for all."""
        return self.rank == 0

    def do(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on this rank; raises on all if it raises on one.

        Raises:
            FxzeroError: it failed on this rank.
            CheckpointError: it failed on another, which is named.
            PeerError: another does not answer.
        """
        return self._run(action, share=False)[0]

    def collect(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returns on each rank; raises as ``do``."""
        return self._run(action, share=True)[1]

    def lead(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, where alone it runs; raises as ``do``."""
        return cast(T, self.collect(lambda: action() if self.leads else None)[0])

    def _run(self, action: Callable[[], T], *, share: bool) -> tuple[T, list[T]]:
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        text = "" if failure is None else f"{type(failure).__name__}: {failure}"
        first = text.partition("\n")[0]
        answers = self._gather((first, result if share else None))
        if isinstance(failure, FxzeroError):
            raise failure
        if failure is not None:
            raise CheckpointError(text) from failure
        for rank, (problem, _) in enumerate(answers):
            if problem:
                raise CheckpointError(f"rank {rank} failed: {problem}")
        return result, [answer for _, answer in answers]

    def _gather(self, answer: Any) -> list[Any]:
        if self.peers is None:
            return [answer]
        answers: list[Any] = [None] * self.size
        with self._explained(self.peers):
            dist.all_gather_object(answers, answer, group=self.group)
        return answers

    def any(self, fact: bool) -> bool:
        """Whether it is so on any rank; the same answer on all.

        Raises:
            PeerError: a rank does not answer.
        """
        if self.peers is None:
            return fact
        found = torch.tensor([fact], dtype=torch.uint8)
        with self._explained(self.peers):
            options = _torch.reduce_options(_torch.default_timeout(), dist.ReduceOp.MAX)
            self.group.allreduce([found], options).wait()
        return bool(found)

    @contextlib.contextmanager
    def _explained(self, peers: Peers) -> Iterator[None]:
        """An error of a collective inside is one of all ranks, also of those that wait for this."""
        try:
            yield
        except RuntimeError as error:
            transfer = Transfer("barrier of all ranks", 0, "all ranks", peers.ranks)
            found = peers.explained(TransferError(transfer, error), self.doing)
            peers.leave(found, self.doing)
            raise found from error

    def close(self) -> None:
        """Gives the group back."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
