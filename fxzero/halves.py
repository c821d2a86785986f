"""Runs a compiled training step as two autograd nodes, for schedules that put weights off.

The backward of the first node computes gradients of the step's inputs, that of the second those of
parameters; in between lies what the second reads of the first (``passes/split_backward.py``).

    outputs, token = run_in_halves(step, inputs)
    torch.autograd.backward(outputs, gradients)     x.grad
    torch.autograd.backward(token)                  w.grad, whenever there is time
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxzero import _torch
from fxzero.accumulation import sums_of
from fxzero.errors import RuntimeStateError
from fxzero.runtime import (
    Executable,
    Halves,
    Parameters,
    Saved,
    explained_errors,
    run_forward,
    tangents_of,
)


def run_in_halves(
    executable: Executable, inputs: Sequence[torch.Tensor], parameters: Parameters
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Model outputs, attached to the inputs, and a token that is attached to all else.

    The outputs' backward runs before the token's, with gradients of all that have a tangent.
    """
    assert executable.halves is not None
    with torch.no_grad():
        outputs, saved = run_forward(executable, parameters, inputs)
    flight = _Flight(executable, executable.halves, parameters, saved, outputs)
    first = flight.halves.inputs
    # Without an anchor nothing would run for a stage whose inputs need no gradient.
    anchor = torch.empty(0, requires_grad=True)
    attached = _First.apply(flight, outputs, anchor, *(inputs[i] for i in first))  # type: ignore[no-untyped-call]
    others = (t for i, t in enumerate(inputs) if i not in first)
    token: torch.Tensor = _Second.apply(flight, *others)  # type: ignore[no-untyped-call]
    return list(attached), token


class _Flight:
    """A step between its forward and the end of its backward."""

    def __init__(
        self,
        executable: Executable,
        halves: Halves,
        parameters: Parameters,
        saved: Saved,
        outputs: list[torch.Tensor],
    ) -> None:
        self.executable = executable
        self.halves = halves
        self.parameters = parameters
        self.saved = saved
        self.shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in outputs]
        self.waiting: list[Any] | None = None

    def first(self, received: dict[int, torch.Tensor]) -> dict[int, Any]:
        """The backward's results that the first half computes, by position."""
        arguments = self.saved.take(keep=False)
        arguments += [None] * len(self.executable.accumulated)  # only the second half adds to them
        arguments += tangents_of(self.executable, received, self.shapes)
        with explained_errors(self.executable, self.parameters):
            results, self.waiting = self.halves.begin(arguments)
        return results

    def second(self, existing: Sequence[Any]) -> dict[int, Any]:
        """The results that the second half computes, by position.

        Args:
            existing: the gradients that it adds to.
        """
        if self.waiting is None:
            raise RuntimeStateError("gradients of weights were asked for before those of inputs")
        waiting, self.waiting = self.waiting, None
        # The backward takes them behind the saved values.
        late = dict(enumerate(existing, self.saved.count))
        with explained_errors(self.executable, self.parameters):
            return self.halves.finish(waiting, late)


class _First(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        flight: _Flight,
        outputs: list[torch.Tensor],
        anchor: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.flight = flight
        with_tangent = flight.executable.differentiable
        ctx.mark_non_differentiable(
            *(t for i, t in enumerate(outputs) if i not in with_tangent and t.is_floating_point())
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        flight: _Flight = ctx.flight
        found = flight.first({i: g for i, g in enumerate(gradients) if g is not None})
        places = (flight.executable.gradients[i] for i in flight.halves.inputs)
        return None, None, None, *(None if at is None else found[at] for at in places)


class _Second(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, *others: torch.Tensor) -> torch.Tensor:
        ctx.flight = flight
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        flight: _Flight = ctx.flight
        executable, parameters = flight.executable, flight.parameters
        first = flight.halves.inputs
        takers: list[Any] = [None] * len(executable.gradients)
        others = [i for i in range(len(takers)) if i not in first]
        for i, (node, _index) in zip(others, ctx.next_functions, strict=True):
            takers[i] = node
        sums = sums_of(takers, executable.accumulated, parameters.existing)
        kept = [i for i in others if takers[i] is not None and _torch.adds_to_leaf(takers[i])]
        results = flight.second(sums.tensors)
        found = [None if at is None else results.get(at) for at in executable.gradients]
        with explained_errors(executable, parameters):
            returned = parameters.returned(found, sums.in_place, kept)
        return None, *(returned[i] for i in others)
