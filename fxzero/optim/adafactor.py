"""Adafactor: second moments as rows times columns (Shazeer and Stern, ICML 2018, arXiv:1804.04235).

A weight, its moments and its gradient are whole at its home (``homes``), where a step is computed
(``factored``), and rows of the new weight and moments go back.  Norms of the whole cannot be put
together from those of rows to the same bit: so all of a weight goes there with the gradient, and
results are those of one process on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor import zeros as zeros_over_ranks

from fxzero.errors import UsageError
from fxzero.optim.arenas import local, whole_indices
from fxzero.optim.checks import check_not_negative
from fxzero.optim.factored import COLUMNS, RandomRounding, moment_shapes, take_step
from fxzero.optim.homes import Share
from fxzero.optim.whole import Group, WholeOptimizer, spread

_STEP = "step"


@dataclass(frozen=True)
class _Weight:
    """A parameter with what its update needs.

    Attributes:
        step: number of the last one.
        kept: the parameter and its moments, all cut over ranks along their first dimension.
        rounding: what rounds the weight, or None: to nearest.
    """

    parameter: Tensor
    step: Tensor
    kept: list[Tensor]
    group: Group
    rounding: RandomRounding | None

    @property
    def cost(self) -> int:
        """Elements: a step reads and writes each some times."""
        return self.parameter.numel()

    @property
    def shares(self) -> list[Share]:
        """All that is kept returns; the gradient does not."""
        assert self.parameter.grad is not None
        kept = [Share(tuple(t.shape), t.dtype) for t in self.kept]
        return [*kept, Share(kept[0].shape, self.parameter.grad.dtype, returns=False)]

    def send(self) -> list[Tensor]:
        """This rank's rows of all; the step is counted."""
        assert self.parameter.grad is not None
        self.step.add_(1)
        return [local(t) for t in (*self.kept, self.parameter.grad)]

    def work(self, wholes: list[Tensor]) -> list[Tensor]:
        """Updates the whole weight and its moments in place."""
        weight, *moments, gradient = wholes
        own = [moments[0], moments[1].T] if weight.ndim == 2 else moments
        take_step(weight, own, gradient, self.step.item(), self.group, self.rounding)
        return [weight, *moments]

    def receive(self, rows: Sequence[Tensor]) -> None:
        """Takes what this rank's rows have become."""
        for own, part in zip(self.kept, rows, strict=True):
            local(own).copy_(part)


class Adafactor(WholeOptimizer):
    """Adafactor, equal to the bit to ``torch.optim.Adafactor`` in float32 and float64.

    In 16 bits moments are float32, a step is computed in float32, and only the new weight is
    rounded; torch's rounds everything.  Random bits belong to elements of all the optimizer has.

    Parameters may be cut into rows over ranks; results do not depend on how many there are, and
    moments are cut, too.  In a step each weight and gradient goes to a rank where it is whole, and
    the weight comes back, so all ranks must step.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: the most that a weight changes by in a step, as a share of itself (root mean squares);
            ``step ** -0.5`` where that is less.  A tensor may be changed between steps.
        beta2_decay: power of the step's number that is the share of new squares in the moments.
        eps: the least of roots of moments (None: the dtype's epsilon), and of the root mean square
            that a weight is taken for.
        d: the most that an update's root mean square may be, before it is scaled down.
        weight_decay: share of the weight, times ``lr``, that it loses in a step.
        maximize: go up instead of down.
        stochastic_rounding: round bfloat16 weights up or down at random, right on average.
        seed: of stochastic rounding.

    Raises:
        UsageError: an option outside of its range, or a parameter that is not of real numbers.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self._seed = seed if stochastic_rounding else None
        self._indices: dict[int, int] = {}
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _homed(self, parameter: Tensor, group: Group) -> _Weight:
        state = self.state[parameter]
        if state:
            self._check_state(parameter, state)
        step = torch.as_tensor(state.get(_STEP, 0.0))
        state[_STEP] = local(step).to("cpu", torch.float32)
        names = moment_shapes(parameter.shape)
        moments = [_moment(name, state.get(name), parameter) for name in names]
        state.update(zip(names, moments, strict=True))
        if parameter.ndim == 2:
            moments[1] = moments[1].T
        rounding = None
        if self._seed is not None and parameter.dtype == torch.bfloat16:
            rounding = RandomRounding(self._seed, self._index_of(parameter))
        return _Weight(parameter, state[_STEP], [parameter, *moments], group, rounding)

    def _index_of(self, parameter: Tensor) -> int:
        """Of its first element among all, as if none was cut."""
        if id(parameter) not in self._indices:
            self._indices = whole_indices(self._parameters)
        return self._indices[id(parameter)]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._indices = {}

    def _check_options(self, group: Mapping[str, Any]) -> None:
        check_not_negative(group, "lr", "weight_decay")
        eps, d, decay = group["eps"], group["d"], group["beta2_decay"]
        if len(eps) != 2 or not all(e is None or 0 <= e < math.inf for e in eps) or eps[1] is None:
            raise UsageError(f"eps={eps} must be a number or None, and a number, both at least 0")
        if not 1 <= d < math.inf:
            raise UsageError(f"d={d} must be a finite number, at least 1")
        if not -math.inf < decay <= 0:
            raise UsageError(f"beta2_decay={decay} must be a finite number, at most 0")

    def _check_parameter(self, parameter: Tensor) -> None:
        if not parameter.is_floating_point():
            raise UsageError(f"Adafactor updates real numbers, not {parameter.dtype}")

    def _check_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        wanted = {_STEP: [], **{n: list(s) for n, s in moment_shapes(parameter.shape).items()}}
        given = {name: list(torch.as_tensor(value).shape) for name, value in state.items()}
        if given != wanted:
            raise UsageError(
                f"the state of a parameter of shape {list(parameter.shape)} has {_listed(given)}; "
                f"Adafactor keeps {_listed(wanted)}\n"
                "  load the state of an Adafactor, fxzero's or torch's"
            )


def _moment(name: str, state: Tensor | None, parameter: Tensor) -> Tensor:
    """A moment that is cut over ranks as its parameter is; a matrix's col_var into columns."""
    shape, part = moment_shapes(parameter.shape)[name], local(parameter)
    dtype = torch.promote_types(part.dtype, torch.float32)
    placements: tuple[Placement, ...] = ()
    if isinstance(parameter, DTensor):
        cut = Shard(1 if name == COLUMNS and parameter.ndim == 2 else 0)
        placements = tuple(cut if p.is_shard() else p for p in parameter.placements)
        if state is None:
            mesh = parameter.device_mesh
            state = zeros_over_ranks(shape, dtype=dtype, device_mesh=mesh, placements=placements)
    if state is None:
        state = torch.zeros(shape, dtype=dtype, device=part.device)
    return spread(state, parameter, dtype, placements)


def _listed(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
