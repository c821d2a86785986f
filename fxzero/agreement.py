"""What all ranks have to agree on before any of them starts a collective.

Ranks run the same graphs in the same order, or they wait for each other for ever.  Before each
training step they compare what it will run, in a few bytes; a new graph is traced by all of them
at once, compared, and planned by the first.  Where they differ, every rank raises the same error.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fxzero import _torch
from fxzero.errors import DivergenceError, FxzeroError, PeerError, first_line
from fxzero.groups import PATIENCE, close_group, make_group
from fxzero.mesh import Mesh

log = logging.getLogger(__name__)

# Seconds in which ranks are to notice a failure that one of them has noticed.
_ANSWER = 2.0
# What the errors of failed collectives say.
_OF_COLLECTIVES = ("gloo", "Gloo", "NCCL", "onnection", "imed out", "Broken pipe", "pair closure")
_ALIKE = "give every rank the same model, and inputs of the same shapes: pad them"


class Agreement:
    """The ranks of a mesh, as they talk to each other outside of graphs: over gloo, on the CPU."""

    def __init__(self, mesh: Mesh) -> None:
        ranks = mesh.devices.mesh.flatten().tolist()
        self.group = make_group(ranks, backend="gloo", timeout=PATIENCE)
        self.rank = dist.get_rank()
        self.store = _torch.default_store()
        self.first = ranks[0]
        self.ranks = ranks

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
            raise self.explained(error, when) from error
        return answers

    def explained(self, error: RuntimeError, when: str) -> RuntimeError:
        """A PeerError for an error of a collective, other errors as they are.

        It says what a rank said that has left.  If none has, every rank that notices leaves a mark
        in the store; who leaves none in time is named.
        """
        text = first_line(error)
        if isinstance(error, PeerError) or not any(word in text for word in _OF_COLLECTIVES):
            return error
        what = f"a collective of rank {self.rank} failed: {text}"
        lines = [f"{when}: {what}"]
        log.error(lines[0])  # a launcher may end this process before the others have answered
        try:
            said = self._said()
            silent = [] if said else self._silent(when)
        except RuntimeError as problem:
            lines.append(f"  the others cannot be asked: {first_line(problem)}")
        else:
            if said:
                lines = [f"{when}: {said[0]}", *(f"  {other}" for other in said[1:]), f"  {what}"]
            else:
                names = ", ".join(map(str, silent)) or "none"
                text = f"no word within {_ANSWER:.0f} s from rank {names}"
                lines.append(f"  {text}: gone, stuck, or waiting for one")
        lines.append("  restart all ranks, from the last checkpoint (torchrun --max-restarts)")
        return PeerError("\n".join(lines))

    def leave(self, error: BaseException, where: str, groups: Sequence[Any]) -> None:
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

    def _silent(self, when: str) -> list[int]:
        """Ranks that do not notice, too, that something failed."""
        keys = {rank: f"fxzero failed {when} {rank}" for rank in self.ranks}
        self.store.set(keys[self.rank], "1")
        end = time.monotonic() + _ANSWER
        while True:
            silent = [rank for rank, key in keys.items() if not self.store.check([key])]
            if not silent or time.monotonic() > end:
                return silent
            time.sleep(0.05)

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
        dist.broadcast_object_list(answer, src=self.first, group=self.group)
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
        try:
            dist.all_gather(every, mine, group=self.group)
        except RuntimeError as error:
            raise self.explained(error, when) from error
        return torch.stack(every)

    def reduced(self, mine: torch.Tensor, how: Any, when: str) -> torch.Tensor:
        """All ranks' numbers reduced by a ``ReduceOp``: of one shape and dtype, on the CPU.

        Raises:
            PeerError: a rank does not answer.
        """
        result = mine.clone()
        try:
            dist.all_reduce(result, how, group=self.group)
        except RuntimeError as error:
            raise self.explained(error, when) from error
        return result

    def _collect(self, text: str) -> list[str]:
        answers: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(answers, text, group=self.group)
        return answers

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
