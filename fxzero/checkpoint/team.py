"""The processes that save or load together, or the one that does it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

from fxzero.errors import CheckpointError, FxzeroError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """All processes of the default group.

    Attributes:
        group: over gloo, for what they tell each other besides tensors; None if there is only one.
    """

    rank: int
    size: int
    group: Any

    @classmethod
    def of_all(cls) -> Team:
        """Every process; they have to call it together."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, 1, None)
        group = dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def leads(self) -> bool:
        """Whether this process does what one has to do for all."""
        return self.rank == 0

    def do(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on this rank; raises on all if it raises on one.

        Raises:
            FxzeroError: it failed on this rank.
            CheckpointError: it failed on another, which is named.
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
        if self.group is None:
            return [answer]
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, answer, group=self.group)
        return answers

    def close(self) -> None:
        """Gives the group back."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
