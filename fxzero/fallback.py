"""Budgets that generated code hardly meets, or not at all, are tried with eager's operators.

Inductor gets another graph than eager: attention, norms and activations are taken apart there, and
what it makes of the parts may need more than their own kernels do.  Where such a graph has to run
operator by operator to keep to a budget, it takes longer, too.  A small BERT:

    budget       generated code                          as eager
    17.5 MiB     needs 18.3 MiB                          73 ms: taken
    18.3 MiB     90 ms, the backward one by one          73 ms: taken
    19.4 MiB     64 ms: taken                            not tried
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fxzero.errors import BudgetError
from fxzero.options import Options
from fxzero.units import format_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What came of options.

    Attributes:
        seconds: a step as it is planned.
        confined: whether operators run one by one for the budget's sake where code was asked for.
    """

    made: T
    seconds: float
    confined: bool


def or_as_eager(options: Options, make: Callable[[Options, tuple[str, ...]], Attempt[T]]) -> T:
    """What ``make`` returns for options, or for ``inner="eager"`` where that fits or is faster.

    Args:
        make: called with options and what a plan is to say of those that were not followed.

    Raises:
        BudgetError: neither fits; that of the two that needs less.  Strict options are kept to.
    """
    last = options.inner == "eager" or options.strict
    try:
        first = make(options, ())
    except BudgetError as refusal:
        if last:
            raise
        try:
            needed = format_bytes(refusal.required_bytes)
            return make(*_eager(options, f"generated code needs {needed}")).made
        except BudgetError as other:
            raise min(refusal, other, key=lambda error: error.required_bytes) from None
    if last or not first.confined:
        return first.made
    try:
        second = make(*_eager(options, "code that fits the budget is slower"))
    except BudgetError:
        return first.made
    return min((first, second), key=lambda attempt: attempt.seconds).made


def _eager(options: Options, why: str) -> tuple[Options, tuple[str, ...]]:
    return replace(options, inner="eager"), (f"operators run one by one, as in eager: {why}",)
