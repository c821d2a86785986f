"""An optimizer's step on a CPU.

Where weights, gradients and moments are of one dtype, torch's fused kernel gets all of them, if it
has one.  Otherwise chunks of an arena go through one loop of generated code, or, in small arenas,
through torch's operators.  Small parameters share a chunk: their states lie side by side, and one
concatenation collects them.

    arena         | a | b | c |           d            |
    chunks        [   a b c   ] [  d  ] [  d  ] [  d  ]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzero import _inductor, _torch
from fxzero.kernels import eager_numerics
from fxzero.kernels.eager_update import Kind, exact_root, update
from fxzero.optim.arenas import LOW, SCALE, Arena, Member, flat, local, mark_written
from fxzero.optim.generated import Loop, arguments, generate
from fxzero.optim.rule import SCALARS, Control, Fused, Group, Rule

# Elements of a chunk: the least and the most for one loop over memory, a power of two, and for
# operators, which make many temporaries.
_LEAST_LOOPED, _MOST_LOOPED, _OPERATED = 1 << 16, 1 << 20, 1 << 14
# A compiler takes seconds: arenas of fewer elements do without.
_WORTH_COMPILING = 1 << 20


def compiles(elements: int) -> bool:
    """Whether chunks of an arena of so many elements go through generated code."""
    return elements >= _WORTH_COMPILING and _inductor.has_compiler("cpu")


def chunk_elements(elements: int) -> int:
    """Elements of a chunk of an arena that has so many."""
    if not compiles(elements):
        return _OPERATED
    quarter: int = 1 << max(elements // 4, 1).bit_length() - 1
    return min(max(quarter, _LEAST_LOOPED), _MOST_LOOPED)


@dataclass(frozen=True)
class _Piece:
    """Elements ``start`` to ``stop`` of one parameter; ``position`` is its gradient's."""

    position: int
    member: Member
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def index(self) -> int:
        """Of its first element in the model."""
        return self.member.index + self.start

    @property
    def place(self) -> int:
        """Of its first element in the arena."""
        return self.member.place + self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements of what lies in memory as the parameter does."""
        whole = flat(tensor)
        return whole if self.size == self.member.elements else whole[self.start : self.stop]


@dataclass(frozen=True)
class _Chunk:
    """Neighbours in an arena, of one group and at one step.

    Attributes:
        held: what a step updates, by name: memory of the parameter or the arena, or scratch.
        copied: scratch that is filled before, and copied back after, with what it stands for.
    """

    pieces: tuple[_Piece, ...]
    held: Mapping[str, Tensor]
    copied: tuple[tuple[Tensor, list[Tensor]], ...]

    @property
    def member(self) -> Member:
        return self.pieces[0].member


@dataclass(frozen=True)
class _Batch:
    """Parameters of one group at one step, for a fused kernel."""

    kernel: Fused
    positions: list[int]
    member: Member
    weights: list[Tensor]
    moments: list[list[Tensor]]


@dataclass(frozen=True)
class _Division:
    """What some parameters of an arena are updated by: batches, or chunks.

    Attributes:
        key: what it was made for: the gradients' dtype, who is at which step, addresses.
        loop: generated code; None: torch's operators.
    """

    key: object
    kind: Kind
    loop: Loop | None
    batches: tuple[_Batch, ...]
    chunks: tuple[_Chunk, ...]


class Scratch:
    """Memory that chunks of one length go through.

    Attributes:
        elements: of the arenas that it is for, at most.
        length: of a chunk.
    """

    def __init__(self, elements: int) -> None:
        self.elements, self.length = elements, chunk_elements(elements)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """That of a name."""
        if (name, dtype) not in self._buffers:
            self._buffers[name, dtype] = torch.zeros(self.length, dtype=dtype)
        return self._buffers[name, dtype]


class ChunkedUpdate:
    """Updates an arena on a CPU.

    Args:
        scratch: shared with others whose turn is another time; None: its own.
    """

    def __init__(self, arena: Arena, rule: Rule, seed: int, scratch: Scratch | None = None) -> None:
        self.arena, self._rule, self._seed = arena, rule, seed
        self._scratch = scratch or Scratch(sum(member.elements for member in arena.members))
        self._size, self._length = self._scratch.elements, self._scratch.length
        self._divisions: dict[tuple[int, ...], _Division] = {}

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
        if len(ready) == len(arena.members):
            arena.steps.add_(1)
        else:
            for member in ready:
                arena.steps[member.row] += 1
        dtypes = {gradient.dtype for gradient in gradients}
        if len(dtypes) > 1:
            gradients, dtypes = [gradient.float() for gradient in gradients], {torch.float32}
        numbers = arena.steps.tolist()
        division = self._divide(ready, dtypes.pop(), numbers)
        if division.batches and factor is not None:
            _torch.scale_all(gradients, factor)
        for batch in division.batches:
            given = [gradients[i] for i in batch.positions]
            step, group = arena.steps[batch.member.row], groups[batch.member.group]
            batch.kernel(group, batch.weights, given, batch.moments, step)
        rows: dict[tuple[int, float], Tensor] = {}
        for chunk in division.chunks:
            at = chunk.member.group, numbers[chunk.member.row]
            if at not in rows:
                rows[at] = self._scalars(groups[at[0]], at[1], factor)
            self._update(chunk, division, gradients, rows[at])
        mark_written(ready)  # neither generated code nor torch's kernels for lists do

    def _scalars(self, group: Group, number: float, factor: Tensor | None) -> Tensor:
        """A row as ``kernels.update`` reads it, float32 [16]."""
        columns = self._rule.scalars(group, torch.tensor([number], dtype=torch.float64))
        row = torch.zeros(SCALARS)
        for column, value in enumerate(columns):
            row[column] = value
        row[-2] = -1.0 if group["maximize"] else 1.0
        row[-2] *= 1.0 if factor is None else factor
        row[-1] = number
        return row

    def _divide(
        self, ready: Sequence[Member], dtype: torch.dtype, numbers: list[float]
    ) -> _Division:
        """Batches or chunks; they stay while memory and who is at which step do.

        Args:
            dtype: of gradients.
        """
        rows = tuple(member.row for member in ready)
        first = numbers[rows[0]]
        key = dtype, [(numbers[m.row] - first, m.address) for m in ready]
        known = self._divisions.get(rows)
        if known is None or known.key != key:
            known = self._divisions[rows] = self._divided(ready, dtype, numbers, key)
        return known

    def _divided(
        self, ready: Sequence[Member], dtype: torch.dtype, numbers: list[float], key: object
    ) -> _Division:
        alike: dict[tuple[int, float], list[int]] = {}
        for position, member in enumerate(ready):
            alike.setdefault((member.group, numbers[member.row]), []).append(position)
        form, kernel = self.arena.form, self._rule.fused
        low_bits = 8 * form.low.itemsize if form.low is not None else 0
        narrow = {form.weight, dtype, form.moments} == {torch.bfloat16}
        pairs = compiles(self._size) and low_bits == 16 and narrow
        kind = Kind(self._rule.name, low_bits, form.stochastic, form.quantum, pairs)
        if kernel is not None and form.plain and dtype == form.weight:
            batches = tuple(self._batch(kernel, ready, each) for each in alike.values())
            return _Division(key, kind, None, batches, ())
        loop = self._generate(kind, dtype) if compiles(self._size) else None
        chunks = tuple(
            self._chunk(pieces, kind, loop)
            for positions in alike.values()
            for pieces in _together(_pieces(ready, positions, self._length), self._length)
        )
        return _Division(key, kind, loop, (), chunks)

    def _generate(self, kind: Kind, gradient: torch.dtype) -> Loop:
        form, count = self.arena.form, len(self.arena.moments)
        moments = (torch.int8, torch.uint8)[:count] if kind.quantum else (form.moments,) * count
        low = {0: (), 8: (torch.int8,), 16: (torch.int32,)}[kind.low_bits]
        dtypes = (form.weight, gradient, *low, *moments)
        return generate(kind, (torch.int32,) * len(dtypes) if kind.pairs else dtypes, self._length)

    def _batch(self, kernel: Fused, ready: Sequence[Member], positions: list[int]) -> _Batch:
        members = [ready[i] for i in positions]
        views = [self.arena.views[member.row] for member in members]
        moments = [[local(view[name]) for view in views] for name in self.arena.moments]
        weights = [local(member.parameter) for member in members]
        return _Batch(kernel, positions, members[0], weights, moments)

    def _chunk(self, pieces: tuple[_Piece, ...], kind: Kind, loop: Loop | None) -> _Chunk:
        place, size = pieces[0].place, sum(piece.size for piece in pieces)
        parts = {"weight": [piece.of(local(piece.member.parameter)) for piece in pieces]}
        for name, arena in self.arena.tensors.items():
            divisor = self.arena.divisor(name)
            parts[name] = [arena[place // divisor : (place + size) // divisor]]
        held, copied = {}, []
        for name, tensors in parts.items():
            held[name] = self._hold(name, tensors, kind, loop)
            if held[name].data_ptr() != tensors[0].data_ptr():
                own = held[name].view(tensors[0].dtype) if kind.pairs else held[name]
                copied.append((own[: _count(tensors)], tensors))
        return _Chunk(pieces, held, tuple(copied))

    def _hold(self, name: str, tensors: list[Tensor], kind: Kind, loop: Loop | None) -> Tensor:
        """What a step is given for tensors: the only one itself, or scratch."""
        first, pairs = tensors[0], kind.pairs
        size = self._length // self.arena.divisor(name) if loop else _count(tensors)
        widened = first.dtype == torch.int16 and not pairs
        even = not pairs or first.storage_offset() % 2 == 0
        if len(tensors) > 1 or first.numel() != size or widened or not even:
            dtype = torch.int32 if widened else first.dtype
            first = self._scratch.buffer(name, dtype)[:size]
        return first.view(torch.int32) if pairs else first

    def _update(
        self, chunk: _Chunk, division: _Division, gradients: Sequence[Tensor], scalars: Tensor
    ) -> None:
        """One chunk, in place where its memory allows, otherwise by way of scratch."""
        kind, loop = division.kind, division.loop
        taken = [piece.of(gradients[piece.position]) for piece in chunk.pieces]
        gradient = self._hold("gradient", taken, kind, loop)
        if gradient.data_ptr() != taken[0].data_ptr():
            own = gradient.view(taken[0].dtype) if kind.pairs else gradient
            torch.cat(taken, out=own[: _count(taken)])
        for scratch, tensors in chunk.copied:
            _collect(tensors, scratch)
        held = chunk.held
        moments = [held[name] for name in self.arena.moments]
        scales = [held[name + SCALE] for name in self.arena.moments] if kind.quantum else []
        weight, low = held["weight"], held.get(LOW)
        if loop is None:
            random = self._random(chunk, int(scalars[-1])) if kind.random else None
            update(kind, weight, low, gradient, moments, scales, scalars, random, exact_root)
        else:
            index = self._index(chunk) if kind.random else None
            seed = torch.tensor(self._seed)
            given = arguments(weight, low, gradient, moments, scales, scalars, seed, index)
            loop(given)
        for scratch, tensors in chunk.copied:
            _torch.copy_all(tensors, scratch.split([tensor.numel() for tensor in tensors]))

    def _random(self, chunk: _Chunk, number: int) -> Tensor:
        """16 random bits for each element."""
        seed, device = self._seed, self.arena.device
        drawn = [
            eager_numerics.random_bits(seed, number, piece.index, piece.size, device)
            for piece in chunk.pieces
        ]
        return torch.cat(drawn)

    def _index(self, chunk: _Chunk) -> Tensor:
        """Of each element in the model, int64."""
        index, start = self._scratch.buffer("index", torch.int64), 0
        for piece in chunk.pieces:
            torch.arange(
                piece.index, piece.index + piece.size, out=index[start : start + piece.size]
            )
            start += piece.size
        return index


def _pieces(ready: Sequence[Member], positions: Iterable[int], length: int) -> Iterator[_Piece]:
    """Parameters, cut where the arena is cut into chunks, so that whole chunks need no scratch."""
    for position in positions:
        member, start = ready[position], 0
        while start < member.elements:
            rest = length - (member.place + start) % length
            stop = min(start + rest, member.elements)
            yield _Piece(position, member, start, stop)
            start = stop


def _together(pieces: Iterable[_Piece], length: int) -> Iterator[tuple[_Piece, ...]]:
    """Neighbours in a chunk of the arena."""
    chosen: list[_Piece] = []
    for piece in pieces:
        if chosen:
            end = chosen[-1].place + chosen[-1].size
            if end != piece.place or end % length == 0:
                yield tuple(chosen)
                chosen = []
        chosen.append(piece)
    if chosen:
        yield tuple(chosen)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _collect(tensors: list[Tensor], scratch: Tensor) -> None:
    if len(tensors) == 1:
        scratch.copy_(tensors[0])
    else:
        torch.cat(tensors, out=scratch)
