"""Bytes that an optimizer of fxzero will keep and need, before there is one.

    footprint(AdamW, {"moments": "int8"}, parameters, "cpu").state

States follow from each parameter's form.  Beside them are, on CUDA, the kernel's table and what
aligns parameters, and on a CPU scratch of some chunks, which does not grow with the model.  What
needs whole tensors has those of a turn at a home, and the messages there and back.  States in host
memory leave a stage on the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxzero.optim.arenas import ALIGNMENT
from fxzero.optim.base import Optimizer
from fxzero.optim.chunks import chunk_elements, compiles
from fxzero.optim.factored import PIECE, moment_shapes
from fxzero.optim.forms import Form, Numerics
from fxzero.optim.homes import TURN_ELEMENTS, choose_homes, turns
from fxzero.optim.hosted import turn_elements
from fxzero.optim.rule import SCALARS

_STEP_BYTES = 4
_SEED_BYTES = 8
# Of a turn's own tensors on CUDA, in blocks of 512 bytes; of a parameter's step in all its turns.
_TURN_BYTES, _NUMBERS_BYTES = 4096, 24
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
        host: kept in host memory.
    """

    state: int
    scratch: int
    transient: int
    host: int = 0


def footprint(
    kind: type[Optimizer],
    options: Mapping[str, Any],
    parameters: Sequence[torch.Tensor],
    device: str,
    hosted: Collection[int] = (),
) -> Footprint:
    """What an optimizer of this class and these options takes for parameters.

    Args:
        options: of its constructor; those that are not about memory do not matter.
        device: "cpu" or "cuda".
        hosted: which of the parameters have their states in host memory; all of them where the
            options ask for it.

    Raises:
        UsageError: options that cannot be right.
    """
    numerics, count = _numerics(options), len(kind.rule.moments)
    away = range(len(parameters)) if options.get("offload") else frozenset(hosted)
    elements: dict[tuple[Form, bool], int] = {}
    state = host = 0
    for number, parameter in enumerate(parameters):
        form, size = numerics.form(parameter), parameter.numel()
        elements[form, number in away] = elements.get((form, number in away), 0) + size
        if device == "cuda":
            state += -(-size // _BLOCK) * _ROW_BYTES + SCALARS * 4
        aligned = _aligned_bytes(form, size, count)
        if number in away:
            host += aligned
        else:
            state += aligned if device == "cuda" else form.state_bytes(size, count)
        state += _STEP_BYTES
    # What goes through a stage goes through it as an arena of a turn's size.
    stage = sum(
        f.state_bytes(turn_elements(n), count) for (f, there), n in elements.items() if there
    )
    if device == "cuda":
        turns = sum(-(-n // turn_elements(n)) for (_, there), n in elements.items() if there)
        return Footprint(state, stage + turns * _TURN_BYTES, 0, host)
    chunked = [
        (form, turn_elements(n) if there else n)
        for (form, there), n in elements.items()
        if not (form.plain and kind.rule.fused)
    ]
    scratch = sum(chunk_elements(n) * _scratch_bytes(f, count) for f, n in chunked)
    by_operators = [min(n, chunk_elements(n)) for _, n in chunked if not compiles(n)]
    transient = _OPERATORS_BYTES * max(by_operators, default=0)
    numbers = _NUMBERS_BYTES * len(parameters) if host else 0
    transient = max(transient, _SEED_BYTES if chunked else 0) + numbers
    return Footprint(state, stage + scratch + numbers, transient, host)


def hostable(
    kind: type[Optimizer], options: Mapping[str, Any], parameters: Sequence[torch.Tensor]
) -> tuple[int, ...]:
    """Bytes of each parameter's state in host memory, where it could be and is not."""
    if options.get("offload"):
        return (0,) * len(parameters)
    numerics, count = _numerics(options), len(kind.rule.moments)
    return tuple(_aligned_bytes(numerics.form(p), p.numel(), count) for p in parameters)


def _numerics(options: Mapping[str, Any]) -> Numerics:
    return Numerics.of(
        options.get("master_bits"),
        options.get("stochastic_rounding", False),
        options.get("moments"),
    )


def _aligned_bytes(form: Form, elements: int, moments: int) -> int:
    """Of a parameter's state in an arena that aligns parameters."""
    return form.state_bytes(-(-elements // ALIGNMENT) * ALIGNMENT, moments)


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
