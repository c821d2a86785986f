"""A model in numbers, from one trace: what a search asks of it a thousand times.

The model is traced once, with its backward, over the smallest micro-batch.  Its operators stand in
a row of units; each unit has its time, what it leaves for the backward, and what it recomputes at
each of the solver's levels.  Larger micro-batches take, and hold, in proportion, but for what it
takes to launch operators.

    unit          forward    backward    leaves: level 0    level 1    recomputes: level 1
    layer 1       2 ms       4 ms        40 MiB             12 MiB     1 ms

Invariant: the sums over all units are those of the traced model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fxzero.errors import UsageError
from fxzero.optimizers import profile_optimizer
from fxzero.pipelining.balance import partition
from fxzero.pipelining.footprint import Levels
from fxzero.pipelining.planning import Chooser
from fxzero.pipelining.profile import origins, weights_of
from fxzero.pipelining.stages import tensors_of

Numbers = NDArray[np.float64]
# So many micro-batches a rank that only the slowest stage counts, where stages are cut.
_MANY = 8


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights of some units.

    Attributes:
        kept: as they are kept.
        computed: as they are gathered and computed with.
        gradient: of those that are trained.
        state: of the optimizer.
        largest: as computed with, of the unit that has most.
    """

    kept: float
    computed: float
    gradient: float
    state: float
    largest: float


@dataclass(frozen=True)
class StageSketch:
    """A run of units that one rank trains; seconds and bytes of the smallest micro-batch.

    Attributes:
        forward, input_gradient, weight_gradient: seconds of each unit.
        forward_launches, backward_launches: of them, what does not grow with the micro-batch.
        gathered, reduced: bytes of each unit's weights and gradients that collectives move.
        saved, seconds: what all units leave for the backward and recompute, by level.
        working: most bytes besides, by level.
        sent: bytes that go to the next stage.
        messages: how many tensors these are.
    """

    forward: Numbers
    input_gradient: Numbers
    weight_gradient: Numbers
    forward_launches: Numbers
    backward_launches: Numbers
    gathered: Numbers
    reduced: Numbers
    weights: Weights
    saved: Numbers
    seconds: Numbers
    working: Numbers
    sent: float
    messages: int

    def of(self, size: int) -> float:
        """Seconds of forward and backward of ``size`` of the smallest micro-batches at once."""
        alone = float((self.forward + self.input_gradient + self.weight_gradient).sum())
        launches = float((self.forward_launches + self.backward_launches).sum())
        return alone * size - launches * (size - 1)


class Sketch:
    """Stages that the units of a model make.

    Args:
        chooser: of the model, over the smallest micro-batch.
        optimizers: what may hold states: name, class of optimizer, or bytes per parameter.
    """

    def __init__(self, chooser: Chooser, levels: Levels, optimizers: Sequence[object]) -> None:
        self._chooser, self._levels = chooser, levels
        self._bounds = chooser.bounds
        self.units = len(self._bounds) - 1
        self.levels = len(levels.saved)
        profile = chooser.profile
        self._times = [profile.times(start, stop) for start, stop in pairwise(self._bounds)]
        self._launches = _launches(chooser, self._bounds)
        self._tensors = _tensors(chooser, self._bounds, optimizers)
        self.stages = cache(self._stages)

    def _stages(self, count: int, optimizer: int = 0) -> tuple[StageSketch, ...]:
        """The model in ``count`` stages of times as even as can be.

        Raises:
            UsageError: there are fewer units.
        """
        if count > self.units:
            raise UsageError(f"the model has {self.units} units, too few for {count} stages")
        cuts = _cuts(self._seconds, self.units, count)
        return tuple(
            self._stage(start, stop, optimizer) for start, stop in pairwise([0, *cuts, self.units])
        )

    def _seconds(self, start: int, stop: int, _: int) -> float:
        return sum(each.total for each in self._times[start:stop])

    def _stage(self, start: int, stop: int, optimizer: int) -> StageSketch:
        times = self._times[start:stop]
        first, last = self._bounds[start], self._bounds[stop]
        mine = [t for t in self._tensors if any(start <= unit < stop for unit in t.units)]
        gathered, reduced = np.zeros(stop - start), np.zeros(stop - start)
        for tensor in mine:  # gathered for its first reader, reduced when that has its gradient
            at = min(unit for unit in tensor.units if start <= unit < stop) - start
            gathered[at] += tensor.computed
            reduced[at] += tensor.gradient
        levels, row = self._levels, self._chooser.row
        return StageSketch(
            forward=np.array([each.forward for each in times]),
            input_gradient=np.array([each.input_gradient for each in times]),
            weight_gradient=np.array([each.weight_gradient for each in times]),
            forward_launches=self._launches[0, start:stop],
            backward_launches=self._launches[1, start:stop],
            gathered=gathered,
            reduced=reduced,
            weights=Weights(
                kept=sum(t.kept for t in mine),
                computed=sum(t.computed for t in mine),
                gradient=sum(t.gradient for t in mine),
                state=sum(t.states[optimizer] for t in mine),
                largest=float(gathered.max(initial=0.0)),
            ),
            saved=(levels.saved[:, last] - levels.saved[:, first]).astype(float),
            seconds=levels.seconds[:, last] - levels.seconds[:, first],
            working=levels.working[:, first:last].max(axis=1).astype(float),
            sent=float(row.bytes_across(last)) if stop < self.units else 0.0,
            messages=len(row.values_across(last)) if stop < self.units else 0,
        )


def _launches(chooser: Chooser, bounds: Sequence[int]) -> Numbers:
    """Seconds that launching the forward's and the backward's operators of each unit takes."""
    graph, costs = chooser.profile.graph, chooser.costs
    free = replace(costs, hardware=replace(costs.hardware, launch=0.0))
    found = np.zeros((2, len(bounds) - 1))
    for node, position in origins(graph).items():
        unit = int(np.searchsorted(bounds, position, side="right")) - 1
        seconds = costs.price(node).seconds - free.price(node).seconds
        found[int(graph.is_backward(node)), unit] += seconds
    return found


@dataclass(frozen=True)
class _Tensor:
    """A weight: bytes, and the units that read it."""

    kept: float
    computed: float
    gradient: float
    states: tuple[float, ...]
    units: frozenset[int]


def _tensors(
    chooser: Chooser, bounds: Sequence[int], optimizers: Sequence[object]
) -> list[_Tensor]:
    """The model's weights; a tied one is one, with all of its readers."""
    tensors, precision = tensors_of(chooser.exports.exported.forward), chooser.options.precision
    places: dict[int, tuple[torch.Tensor, set[int]]] = {}
    for name, positions in weights_of(chooser.row).items():
        if name in tensors:
            tensor, units = places.setdefault(id(tensors[name]), (tensors[name], set()))
            units.update(int(np.searchsorted(bounds, at, side="right")) - 1 for at in positions)
    found = []
    for tensor, units in places.values():
        narrow = precision.param if tensor.is_floating_point() else None
        computed = tensor.numel() * (narrow or tensor.dtype).itemsize
        is_trained = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        states = tuple(_state_bytes(each, tensor) if is_trained else 0.0 for each in optimizers)
        gradient = float(tensor.nbytes) if is_trained else 0.0
        shared = computed if isinstance(tensor, torch.nn.Parameter) else 0.0
        found.append(_Tensor(tensor.nbytes, shared, gradient, states, frozenset(units)))
    return found


def _state_bytes(optimizer: object, tensor: torch.Tensor) -> float:
    profile = profile_optimizer(optimizer, [tensor], "cpu")
    return float(profile.state_bytes - profile.scratch_bytes)


def _cuts(seconds: Callable[[int, int, int], float], units: int, count: int) -> tuple[int, ...]:
    if count == 1:
        return ()
    (best,) = partition(units, count, _MANY * count, seconds)
    return best.cuts
