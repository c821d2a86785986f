"""Bytes that an optimizer of fxzero will keep and need, before there is one.

    footprint(AdamW, {"moments": "int8"}, parameters, "cpu").state

States follow from each parameter's form.  Beside them are, on CUDA, the kernel's table and what
aligns parameters, and on a CPU scratch of some chunks, which does not grow with the model.  What
needs whole tensors has those of a turn at a home, and the messages there and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxzero.optim.arenas import ALIGNMENT
from fxzero.optim.base import Optimizer
from fxzero.optim.chunks import chunk_elements, compiles
from fxzero.optim.factored import PIECE, moment_shapes
from fxzero.optim.forms import Form, Numerics
from fxzero.optim.homes import TURN_ELEMENTS, choose_homes, turns
from fxzero.optim.rule import SCALARS

_STEP_BYTES = 4
_SEED_BYTES = 8
# Of the kernel's table: a row of 8 int64 for a block of at least 1024 elements.
_BLOCK, _ROW_BYTES = 1024, 64
# Of a chunk's element while torch's operators run one by one: temporaries, most of them float32.
_OPERATORS_BYTES = 60
# Of an element that travels to a home of Muon's: what leaves, a copy of it in one piece, what came
# back, and what it is made from.
_TRAVELING_BYTES = 8
# Of an element of Adafactor's that is rounded at random: what random bits are made from, and it.
_ROUNDING_BYTES = 27


@dataclass(frozen=True)
class Footprint:
    """Bytes of an optimizer.

    Attributes:
        state: of what grows with the parameters.
        scratch: kept between steps besides, at most.
        transient: needed while it steps besides, at most.
    """

    state: int
    scratch: int
    transient: int


def footprint(
    kind: type[Optimizer],
    options: Mapping[str, Any],
    parameters: Sequence[torch.Tensor],
    device: str,
) -> Footprint:
    """What an optimizer of this class and these options takes for parameters.

    Args:
        options: of its constructor; those that are not about numerics do not matter.
        device: "cpu" or "cuda".

    Raises:
        UsageError: options that cannot be right.
    """
    numerics = Numerics.of(
        options.get("master_bits"),
        options.get("stochastic_rounding", False),
        options.get("moments"),
    )
    elements: dict[Form, int] = {}
    count, state = len(kind.rule.moments), 0
    for parameter in parameters:
        form, size = numerics.form(parameter), parameter.numel()
        elements[form] = elements.get(form, 0) + size
        if device == "cuda":
            state += -(-size // _BLOCK) * _ROW_BYTES + SCALARS * 4
            size = -(-size // ALIGNMENT) * ALIGNMENT
        state += form.state_bytes(size, count) + _STEP_BYTES
    if device == "cuda":
        return Footprint(state, 0, 0)
    chunked = {f: n for f, n in elements.items() if not (f.plain and kind.rule.fused)}
    scratch = sum(chunk_elements(n) * _scratch_bytes(f, count) for f, n in chunked.items())
    by_operators = [min(n, chunk_elements(n)) for n in chunked.values() if not compiles(n)]
    transient = _OPERATORS_BYTES * max(by_operators, default=0)
    return Footprint(state, scratch, max(transient, _SEED_BYTES if chunked else 0))


def _scratch_bytes(form: Form, moments: int) -> int:
    """Of an element of a chunk: weight, gradient, low bits, moments, and its index in the model."""
    low = 0 if form.low is None else 4
    index = 8 if form.stochastic or form.quantum else 0
    scales = -(-4 // form.quantum) * moments if form.quantum else 0
    return 2 * form.weight.itemsize + low + moments * form.moments.itemsize + index + scales


def muon_footprint(parameters: Sequence[torch.Tensor], shards: int) -> Footprint:
    """What a ``Muon`` takes for matrices; what is none counts as in the ``AdamW`` that it needs.

    Args:
        parameters: as a rank has them.
        shards: ranks that each have rows of all of them.
    """
    matrices = [p for p in parameters if p.ndim == 2]
    state = sum(p.nbytes for p in matrices)
    state += sum(2 * p.nbytes + _STEP_BYTES for p in parameters if p.ndim != 2)
    wide = max((p.nbytes + 2 * p.numel() for p in matrices), default=0)
    work = max((_iteration_bytes(p, shards) for p in matrices), default=0)
    if shards == 1:
        return Footprint(state, 0, max(wide, work))
    largest = max((p.numel() * shards for p in matrices), default=0)
    # In a turn no home has more than its share of all, and one matrix.
    share = sum(p.numel() for p in matrices) + largest
    taken = max(largest, min(share, TURN_ELEMENTS))
    return Footprint(state, 0, max(wide, 2 * taken + work, _TRAVELING_BYTES * taken))


def _iteration_bytes(parameter: torch.Tensor, shards: int) -> int:
    """Of Muon's iteration, in bfloat16: three of the whole matrix, two of its shorter side."""
    short, long = sorted((parameter.shape[0] * shards, parameter.shape[1]))
    return 6 * short * long + 4 * short * short


@dataclass(frozen=True)
class _Factored:
    """A weight of an ``Adafactor``, as its home sees it.

    Attributes:
        shape: of the whole.
        dtype: of the weight and its gradient.
        stochastic: whether a bfloat16 weight is rounded at random.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stochastic: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def moments(self) -> int:
        """Bytes of what is kept."""
        shapes = moment_shapes(self.shape).values()
        return self._wide.itemsize * sum(math.prod(shape) for shape in shapes)

    @property
    def returning(self) -> int:
        """Bytes of the weight and its moments."""
        return self.elements * self.dtype.itemsize + self.moments

    @property
    def going(self) -> int:
        """Bytes of those and of the gradient."""
        return self.returning + self.elements * self.dtype.itemsize

    @property
    def work(self) -> int:
        """Bytes of a step's temporaries: the update, a mean a matrix, and what is widened."""
        copies = 1 if self.dtype == self._wide else 2
        means = math.prod(self.shape[:-2]) if len(self.shape) > 1 else 0
        wide = self._wide.itemsize
        if not (self.stochastic and self.dtype == torch.bfloat16):
            return wide * (copies * self.elements + means)
        rounding = _ROUNDING_BYTES * min(self.elements, PIECE)
        return wide * self.elements + max(wide * (self.elements + means), rounding)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


def adafactor_footprint(
    options: Mapping[str, Any], parameters: Sequence[torch.Tensor], shards: int
) -> Footprint:
    """What an ``Adafactor`` takes.

    Args:
        options: of its constructor.
        parameters: as a rank has them.
        shards: ranks that each have rows of all of them.
    """
    shapes = [(p.shape[0] * shards, *p.shape[1:]) if p.ndim else () for p in parameters]
    stochastic = bool(options.get("stochastic_rounding", False))
    weights = [_Factored(s, p.dtype, stochastic) for s, p in zip(shapes, parameters, strict=True)]
    state = sum(-(-w.moments // shards) + _STEP_BYTES for w in weights)
    if shards == 1:
        return Footprint(state, 0, max((w.work for w in weights), default=0))
    sizes, transient = [w.elements for w in weights], 0
    for turn in turns(choose_homes(sizes, shards), sizes, TURN_ELEMENTS):
        homes = [[weights[n] for n in own] for own in turn]
        here = -(-sum(w.going for own in homes for w in own) // shards)
        for own in homes:
            going, returning = sum(w.going for w in own), sum(w.returning for w in own)
            there = max(here + going, 2 * going, going + max((w.work for w in own), default=0))
            # What has been worked on, a copy of it in one piece, and what comes back.
            transient = max(transient, there, 2 * returning + here)
    return Footprint(state, 0, transient)
