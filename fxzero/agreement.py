"""What all ranks have to agree on before any of them starts a collective.

Ranks run the same graphs in the same order, or they wait for each other for ever.  Before each
training step they compare what it will run, in a few bytes; a new graph is traced by all of them
at once, compared, and planned by the first.  Where they differ, every rank raises the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fxzero import _torch
from fxzero.errors import DivergenceError, FxzeroError, first_line
from fxzero.failures import Peers, Transfer, TransferError
from fxzero.groups import PATIENCE, make_group
from fxzero.mesh import Mesh

_ALIKE = "give every rank the same model, and inputs of the same shapes: pad them"


class Agreement(Peers):
    """The ranks of a mesh, as they talk to each other outside of graphs: over gloo, on the CPU.

    They wait for each other's steps as long as the default process group does, and for a plan as
    long as that takes.
    """

    def __init__(self, mesh: Mesh) -> None:
        ranks = mesh.devices.mesh.flatten().tolist()
        patience = max(PATIENCE, _torch.default_timeout())
        super().__init__(make_group(ranks, backend="gloo", timeout=patience))
        self.first = ranks[0]

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that plans."""
        return bool(self.rank == self.first)

    def on_step(self, description: str, facts: Sequence[bool], when: str) -> list[list[int]]:
        """For each of some facts what all ranks say to it, of a step that they describe alike.

        Args:
            when: which step it is, for errors.

        Raises:
            DivergenceError: descriptions differ; on every rank.
            PeerError: a rank does not answer.
        """
        mine = torch.tensor([_number(description), *map(int, facts)])
        numbers, *answers = self.numbers(mine, when).T.tolist()
        if len(set(numbers)) > 1:
            self._refuse("ranks were given different steps", self._collect(description))
        return answers

    def told_by_all(self, value: Any, when: str) -> list[Any]:
        """What every rank says, in the order of ``ranks``; all ranks call it.

        Args:
            value: anything that can be pickled.
            when: what it is about, for errors.

        Raises:
            PeerError: a rank does not answer.
        """
        answers: list[Any] = [None] * len(self.ranks)
        try:
            dist.all_gather_object(answers, value, group=self.group)
        except RuntimeError as error:
            raise self._explained("what all ranks say", 0, error, when) from error
        return answers

    def _explained(self, what: str, size: int, error: RuntimeError, when: str) -> RuntimeError:
        return self.explained(
            TransferError(Transfer(what, size, "all ranks", self.ranks), error), when
        )

    def on_result(
        self,
        make: Callable[[], Any],
        digest: Callable[[Any], str],
        differing: str = "ranks do not have the same graph",
        advice: str = _ALIKE,
    ) -> Any:
        """What ``make`` returns, if it returns on all ranks and digests are equal.

        Args:
            differing: what the error says where they are not, before the digests.
            advice: what it says behind them.

        Raises:
            FxzeroError: it failed here.
            DivergenceError: it failed elsewhere, or digests differ.
        """
        try:
            made = make()
        except FxzeroError as error:
            self._collect(f"{type(error).__name__}: {first_line(error)}")
            raise
        except Exception as error:
            self._collect(f"{type(error).__name__}: {error}")
            raise
        answers = self._collect(digest(made))
        if len(set(answers)) > 1:
            self._refuse(differing, answers, advice)
        return made

    def of_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, or raises, on the first rank."""
        answer: list[Any] = [None]
        if self.leads:
            try:
                answer = [make()]
            except FxzeroError as error:
                answer = [error]
            except Exception as error:
                text = f"rank {self.first} failed to plan: {type(error).__name__}: {error}"
                answer = [DivergenceError(text)]
                answer[0].__cause__ = error
        try:
            dist.broadcast_object_list(answer, src=self.first, group=self.group)
        except RuntimeError as error:
            raise self._explained("the first rank's plan", 0, error, "planning") from error
        if isinstance(answer[0], FxzeroError):
            raise answer[0]
        return answer[0]

    def on_equal(
        self, text: str, among: Sequence[Sequence[int]], differing: str, advice: str
    ) -> None:
        """Compares what ranks say within groups of them; all ranks call it.

        Args:
            among: the global ranks of each group.
            differing: what the error says where they differ, before what they said.
            advice: what it says behind that.

        Raises:
            DivergenceError: ranks of a group differ; on every rank.
        """
        said = dict(zip(self.ranks, self._collect(text), strict=True))
        if any(len({said[rank] for rank in group}) > 1 for group in among):
            self._refuse(differing, list(said.values()), advice)

    def numbers(self, mine: torch.Tensor, when: str) -> torch.Tensor:
        """Every rank's numbers, [ranks, ...]: of one shape and dtype, on the CPU.

        Raises:
            PeerError: a rank does not answer.
        """
        every = [torch.empty_like(mine) for _ in self.ranks]
        options = _torch.gather_options(_torch.default_timeout())
        try:
            self.group.allgather([every], [mine], options).wait()
        except RuntimeError as error:
            size = mine.nbytes * len(self.ranks)
            raise self._explained("agreement of all ranks", size, error, when) from error
        return torch.stack(every)

    def reduced(self, mine: torch.Tensor, how: Any, when: str) -> torch.Tensor:
        """All ranks' numbers reduced by a ``ReduceOp``: of one shape and dtype, on the CPU.

        Raises:
            PeerError: a rank does not answer.
        """
        result = mine.clone()
        options = _torch.reduce_options(_torch.default_timeout(), how)
        try:
            self.group.allreduce([result], options).wait()
        except RuntimeError as error:
            raise self._explained("agreement of all ranks", mine.nbytes, error, when) from error
        return result

    def _collect(self, text: str) -> list[Any]:
        return self.told_by_all(text, "planning")

    def _refuse(self, what: str, answers: list[str], advice: str = _ALIKE) -> None:
        lines = [f"{what}; no collective was started"]
        by_answer: dict[str, list[int]] = {}
        for rank, answer in zip(self.ranks, answers, strict=True):
            by_answer.setdefault(answer, []).append(rank)
        for answer, ranks in by_answer.items():
            lines.append(f"  rank {', '.join(map(str, ranks))}: {answer}")
        lines.append(f"  {advice}")
        raise DivergenceError("\n".join(lines))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
