"""An optimizer's step where states lie in host memory (ZeRO-Offload, Ren et al., USENIX ATC 2021).

An arena in host memory is updated a turn at a time.  Each turn's states are copied to a stage on
the device, updated there as those of any arena, and copied back:

    host      |   turn 0   |   turn 1   |   turn 2   | ...
                   |  ^
    device      [  stage  ]  <- weights and gradients, which are there

A turn takes up to ``turn_elements``, and parameters are cut where turns are, so the device has one
stage whatever the sizes of the arena and of its largest parameter.

Invariant: weights and states are bitwise those of an arena on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzero import _torch
from fxzero.errors import UsageError
from fxzero.optim.arenas import Arena, Member, flat, local, mark_written
from fxzero.optim.rule import Control, Group, Update

# Elements of a turn, powers of two: few enough for their stage not to matter, and enough for copies
# to be long.  Places in arenas and scales divide the least.
_LEAST, _MOST = 1 << 10, 1 << 22
# Turns that an arena has at least, but for small ones.
_TURNS = 16


def turn_elements(elements: int) -> int:
    """The most elements of a turn of an arena that has so many."""
    part = 1 << (max(elements // _TURNS, 1).bit_length() - 1)
    return min(max(part, _LEAST), _MOST)


@dataclass(frozen=True)
class _Turn:
    """A range of an arena.

    Attributes:
        start: its first place.
        update: of an arena that lies in the stage, whose members are parts of the parameters.
        owners: for each of these the row of its parameter, int64 on the device.
        rows: the same as numbers.
        firsts: for each, the first element of the parameter.
    """

    start: int
    update: Update
    owners: Tensor
    rows: tuple[int, ...]
    firsts: tuple[int, ...]


class HostedUpdate:
    """Updates an arena in host memory.

    Args:
        make: the update of an arena on the device, which gets one for each turn.
    """

    def __init__(self, arena: Arena, make: Callable[[Arena], Update]) -> None:
        self.arena, self._make = arena, make
        self._length = turn_elements(sum(member.elements for member in arena.members))
        self._stage = {
            name: torch.zeros(
                self._length // arena.divisor(name), dtype=t.dtype, device=arena.device
            )
            for name, t in arena.tensors.items()
        }
        self._turns: dict[int, _Turn] = {}
        self._addresses: dict[int, int] = {}

    def __call__(
        self,
        ready: Sequence[Member],
        gradients: Sequence[Tensor],
        control: Control,
        groups: Sequence[Group],
    ) -> None:
        if _torch.is_capturing():
            raise UsageError(
                "a CUDA graph is being captured, and the optimizer's states are in host memory\n"
                "  keep them on the device, or run the step outside of the graph"
            )
        if any(self._addresses.get(member.row) != member.address for member in ready):
            self._make_turns()
        given = {m.row: flat(gradient) for m, gradient in zip(ready, gradients, strict=True)}
        before = self.arena.steps.clone()
        for number in sorted({number for member in ready for number in self._numbers(member)}):
            self._run(self._turns[number], given, before, control, groups)
        mark_written(ready)

    @property
    def stage(self) -> list[Tensor]:
        """What turns go through, on the device."""
        return list(self._stage.values())

    def _run(
        self,
        turn: _Turn,
        given: Mapping[int, Tensor],
        before: Tensor,
        control: Control,
        groups: Sequence[Group],
    ) -> None:
        """One turn, for the members of it that have gradients.

        Args:
            given: gradients by the rows of their parameters.
            before: numbers of steps before this one.
        """
        stage = turn.update.arena
        members = [m for m, row in zip(stage.members, turn.rows, strict=True) if row in given]
        parts = []
        for member in members:
            first = turn.firsts[member.row]
            parts.append(given[turn.rows[member.row]][first : first + member.elements])
        first, last = members[0].place, members[-1].place + members[-1].elements
        pairs = []
        for name, here in self._stage.items():
            each = self.arena.divisor(name)
            kept = self.arena.tensors[name][
                (turn.start + first) // each : (turn.start + last) // each
            ]
            pairs.append((kept, here[first // each : last // each]))
        for host, here in pairs:
            here.copy_(host, non_blocking=True)
        stage.steps.copy_(before.index_select(0, turn.owners))
        turn.update(members, parts, control, groups)
        self.arena.steps.index_copy_(0, turn.owners, stage.steps)
        for host, here in pairs:
            host.copy_(here, non_blocking=True)

    def _numbers(self, member: Member) -> range:
        """Of the turns that a parameter is in; an empty part, which has steps too, is in one."""
        last = member.place + max(member.elements, 1) - 1
        return range(member.place // self._length, last // self._length + 1)

    def _make_turns(self) -> None:
        """Anew, as parameters have moved."""
        parts: dict[int, list[tuple[Member, int, int]]] = {}
        for member in self.arena.members:
            for number in self._numbers(member):
                begin = number * self._length - member.place
                first, stop = max(begin, 0), min(begin + self._length, member.elements)
                parts.setdefault(number, []).append((member, first, stop))
        self._turns = {number: self._turn(number, own) for number, own in parts.items()}
        self._addresses = {member.row: member.address for member in self.arena.members}

    def _turn(self, number: int, parts: Sequence[tuple[Member, int, int]]) -> _Turn:
        arena, start, members = self.arena, number * self._length, []
        for row, (member, first, stop) in enumerate(parts):
            weight = flat(local(member.parameter).detach())[first:stop]
            place, index = member.place + first - start, member.index + first
            members.append(Member(weight, member.group, place, stop - first, index, row, True))
        steps = torch.zeros(len(members), device=arena.device)
        views = tuple(
            {name: self._stage[name][m.place : m.place + m.elements] for name in arena.moments}
            for m in members
        )
        staged = Arena(arena.form, arena.moments, tuple(members), self._stage, steps, views)
        rows = tuple(member.row for member, _, _ in parts)
        owners = torch.tensor(rows, device=arena.device)
        return _Turn(start, self._make(staged), owners, rows, tuple(f for _, f, _ in parts))
