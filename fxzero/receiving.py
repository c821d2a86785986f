"""A compiled model's optimizer, where it does more than ``optimizer.step()`` says.

It takes the gradients that a backward hands over instead of returning them:

    loss.backward()      updates each weight, as soon as its gradient is there and nothing reads it
    optimizer.step()     updates the others, and ends the step

And it keeps the states in host memory that the Plan has there.  ``model.update_with`` names the
optimizer.  Where a step is verified, gradients are kept instead.

Invariant: weights and states are bitwise what ``optimizer.step()`` alone would make of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from fxzero.errors import RuntimeStateError, UsageError
from fxzero.optim.base import Optimizer
from fxzero.plans import Plan


class Receiver(Protocol):
    """Who takes gradients while a backward runs."""

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Called before a backward that will hand over the gradients of these, by name."""

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Called in it for each, with a gradient that is spread over ranks as the parameter is."""


class Updates:
    """What a compiled model's optimizer is told, and who takes what backwards do not return."""

    def __init__(self) -> None:
        self.receiver: Receiver | None = None
        self.optimizer: Optimizer | None = None
        self._on_host: set[str] = set()

    def name(self, optimizer: Optimizer) -> None:
        """Makes it the optimizer of this model."""
        self.receiver = self.optimizer = optimizer
        self._on_host = set()

    def place(self, plan: Plan, model: nn.Module) -> None:
        """Has the optimizer keep states where a plan has them.

        Where several plans of a model differ, what any of them has in host memory stays there.
        Where gradients are kept, no optimizer takes a step.

        Raises:
            RuntimeStateError: there is no optimizer to tell.
        """
        names = plan.decisions.host_states
        if self._on_host.issuperset(names) or isinstance(self.receiver, _Keeper):
            return
        if self.optimizer is None:
            raise RuntimeStateError(
                f"the plan keeps the optimizer's state of {len(names)} parameters in host memory, "
                "but nobody has told the optimizer\n"
                "  call model.update_with(optimizer) before the first step"
            )
        self._on_host.update(names)
        owned = dict(model.named_parameters(remove_duplicate=False))
        self.optimizer.keep_on_host(owned[name] for name in sorted(self._on_host))

    def begin(self, parameters: Mapping[str, Tensor]) -> Receiver:
        """Who takes the gradients of these parameters.

        Raises:
            RuntimeStateError: nobody does, or there are gradients from before.
        """
        if self.receiver is None:
            raise RuntimeStateError(
                'update="backward", but no optimizer is there to take gradients\n'
                "  call model.update_with(optimizer) before the first backward"
            )
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                raise RuntimeStateError(
                    f'{name} has a gradient from before, which update="backward" does not add to\n'
                    '  call optimizer.zero_grad(), or compile with update="step" to accumulate'
                )
        self.receiver.begin(parameters)
        return self.receiver

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, backwards update nothing: gradients are left in ``.grad``."""
        before, self.receiver = self.receiver, _Keeper()
        try:
            yield
        finally:
            self.receiver = before


class _Keeper:
    """Leaves gradients where autograd would."""

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        pass

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        parameter.grad = gradient


def check_updater(optimizer: object, model: nn.Module) -> Optimizer:
    """An optimizer that can update the model's parameters one by one, and keep states elsewhere.

    Raises:
        UsageError: it cannot, or has not all of them.
    """
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer)
        raise UsageError(
            f"{kind.__module__}.{kind.__name__} can neither update parameters one by one in a "
            "backward nor keep states in host memory\n  use fxzero.optim.AdamW, SGD or Lion"
        )
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if id(p) not in owned]
    if missing:
        raise UsageError(
            f"the optimizer has not {len(missing)} of the model's {len(trained)} trained "
            f"parameters, {missing[0]} among them\n"
            "  make it after fxzero.compile, from model.parameters()"
        )
    return optimizer
