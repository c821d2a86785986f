"""An optimizer's step by torch's operators, in chunks that stay in the processor's cache.

Where weights and moments are of one dtype, torch's fused kernel gets all of them at once.
Otherwise a chunk goes through float32 scratch:

    high, low -> weight     codes -> moments     rule     weight -> high, low     moments -> codes

Small parameters share a chunk: their states lie side by side, and one concatenation collects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzero import _torch
from fxzero.kernels import eager_moments, eager_numerics
from fxzero.optim.arenas import LOW, SCALE, Arena, Member
from fxzero.optim.rule import Control, Group, Rule

CHUNK = 1 << 16
# A kernel's loop over vectors ends before a rest that is computed in another way.  There is never
# a rest, so an element's result does not depend on how many are beside it.
_VECTOR = 64


@dataclass(frozen=True)
class _Piece:
    """Elements of one parameter in a chunk: ``start`` to ``stop`` of them."""

    position: int
    member: Member
    start: int
    stop: int


@dataclass(frozen=True)
class _Chunk:
    """Neighbours in an arena."""

    group: int
    number: int
    pieces: tuple[_Piece, ...]

    @property
    def place(self) -> int:
        """Where it begins in the arena."""
        return self.pieces[0].member.place + self.pieces[0].start

    @property
    def size(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


class ChunkedUpdate:
    """Updates an arena by torch's operators."""

    def __init__(self, arena: Arena, rule: Rule, seed: int) -> None:
        self.arena, self._rule, self._seed = arena, rule, seed
        self._scratch: dict[str, Tensor] = {}

    def __call__(
        self,
        ready: Sequence[Member],
        gradients: Sequence[Tensor],
        control: Control,
        groups: Sequence[Group],
    ) -> None:
        if control.found_inf is not None and bool(control.found_inf):
            return
        arena, factor = self.arena, control.factor(self.arena.device)
        if factor is not None:
            _torch.scale_all(gradients, factor)
        if len(ready) == len(arena.members):
            arena.steps.add_(1)
        else:
            for member in ready:
                arena.steps[member.row] += 1
        if arena.form.plain and all(g.dtype == arena.form.weight for g in gradients):
            self._update_whole(ready, gradients, groups)
        else:
            for chunk in self._chunks(ready):
                self._update_chunk(chunk, gradients, groups)

    def _update_whole(
        self, ready: Sequence[Member], gradients: Sequence[Tensor], groups: Sequence[Group]
    ) -> None:
        """By the kernels that torch has for one dtype."""
        arena = self.arena
        numbers = arena.steps.tolist()
        alike: dict[tuple[int, float], list[int]] = {}
        for position, member in enumerate(ready):
            alike.setdefault((member.group, numbers[member.row]), []).append(position)
        for (group, _), positions in alike.items():
            members = [ready[i] for i in positions]
            moments = [
                [arena.tensors[name][m.place : m.place + m.elements] for m in members]
                for name in arena.moments
            ]
            weights = [member.weight for member in members]
            chosen = [gradients[i] for i in positions]
            self._rule.apply(groups[group], weights, chosen, moments, arena.steps[members[0].row])

    def _chunks(self, ready: Iterable[Member]) -> Iterator[_Chunk]:
        """Neighbours of one group that are at one step, at most CHUNK elements at a time."""
        numbers = self.arena.steps.tolist()
        pieces: list[_Piece] = []
        end = -1
        for position, member in enumerate(ready):
            for start in range(0, member.elements, CHUNK):
                stop = min(start + CHUNK, member.elements)
                piece = _Piece(position, member, start, stop)
                first = pieces[0] if pieces else piece
                joins = member.place + start == end and (
                    (member.group, numbers[member.row])
                    == (first.member.group, numbers[first.member.row])
                )
                filled = member.place + stop - (first.member.place + first.start) > CHUNK
                if pieces and (filled or not joins):
                    yield self._chunk(pieces, numbers)
                    pieces = []
                pieces.append(piece)
                end = member.place + stop
        if pieces:
            yield self._chunk(pieces, numbers)

    def _chunk(self, pieces: list[_Piece], numbers: list[float]) -> _Chunk:
        member = pieces[0].member
        return _Chunk(member.group, int(numbers[member.row]), tuple(pieces))

    def _update_chunk(
        self, chunk: _Chunk, gradients: Sequence[Tensor], groups: Sequence[Group]
    ) -> None:
        """Into scratch, by the rule, and back."""
        form, place, size = self.arena.form, chunk.place, chunk.size
        padded = -(-size // _VECTOR) * _VECTOR
        here = slice(place, place + size)
        high = self._collected([p.member.weight[p.start : p.stop] for p in chunk.pieces], "high")
        weight = self._buffer("weight", torch.float32)
        if form.low is None:
            weight[:size].copy_(high)
        else:
            eager_numerics.join(high, self.arena.tensors[LOW][here], weight[:size])
        gradient = self._buffer("gradient", torch.float32)
        parts = [gradients[p.position][p.start : p.stop] for p in chunk.pieces]
        gradient[:size].copy_(self._collected(parts, "parts"))
        random = self._random(chunk) if form.stochastic or form.quantum else None
        moments = [self._load(name, here) for name in self.arena.moments]
        self._rule.apply(
            groups[chunk.group],
            [weight[:padded]],
            [gradient[:padded]],
            [[moment[:padded]] for moment in moments],
            self.arena.steps[chunk.pieces[0].member.row],
        )
        if form.low is not None:
            eager_numerics.split(weight[:size], high, self.arena.tensors[LOW][here])
        elif form.stochastic:
            assert random is not None
            eager_numerics.stochastic_bfloat16(weight[:size], random, high)
        else:
            high.copy_(weight[:size])
        if len(chunk.pieces) > 1:
            sizes = [p.stop - p.start for p in chunk.pieces]
            weights = [p.member.weight for p in chunk.pieces]
            _torch.copy_all(weights, high.split(sizes))
        for number, (name, moment) in enumerate(zip(self.arena.moments, moments, strict=True)):
            self._store(name, here, moment[:size], random, number)

    def _collected(self, parts: list[Tensor], name: str) -> Tensor:
        """Parts side by side: the only one itself, or a copy in scratch."""
        if len(parts) == 1:
            return parts[0]
        size = sum(part.numel() for part in parts)
        buffer = self._buffer(name, parts[0].dtype)[:size]
        torch.cat(parts, out=buffer)
        return buffer

    def _buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """Scratch of a chunk's size."""
        if name not in self._scratch or self._scratch[name].dtype != dtype:
            self._scratch[name] = torch.zeros(CHUNK, dtype=dtype, device=self.arena.device)
        return self._scratch[name]

    def _load(self, name: str, here: slice) -> Tensor:
        """Moments of a chunk in float32."""
        moment = self._buffer(name, torch.float32)
        stored, quantum = self.arena.tensors[name][here], self.arena.form.quantum
        if quantum:
            scales = self.arena.tensors[name + SCALE][here.start // quantum : here.stop // quantum]
            eager_moments.decode(stored, scales, quantum, moment[: len(stored)])
        else:
            moment[: len(stored)].copy_(stored)
        return moment

    def _store(
        self, name: str, here: slice, moment: Tensor, random: Tensor | None, number: int
    ) -> None:
        stored, quantum = self.arena.tensors[name][here], self.arena.form.quantum
        if quantum:
            assert random is not None
            bits = random >> 8 if number else random & 0xFF
            scales = self.arena.tensors[name + SCALE][here.start // quantum : here.stop // quantum]
            eager_moments.encode(moment, bits, quantum, stored, scales)
        else:
            stored.copy_(moment)

    def _random(self, chunk: _Chunk) -> Tensor:
        parts = [
            eager_numerics.random_bits(
                self._seed,
                chunk.number,
                piece.member.index + piece.start,
                piece.stop - piece.start,
                self.arena.device,
            )
            for piece in chunk.pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
