"""Budgets that no generated code meets are tried with the operators that eager runs.

Inductor gets another graph than eager: attention, norms and activations are taken apart there, and
what it makes of the parts may need more than their own kernels do.

    inner="inductor", 10.6 MiB    generated code    needs 11.5 MiB
                                  as eager          needs 10.5 MiB: taken
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from fxzero.errors import BudgetError
from fxzero.options import Options
from fxzero.units import format_bytes

T = TypeVar("T")


def or_as_eager(options: Options, make: Callable[[Options, tuple[str, ...]], T]) -> T:
    """What ``make`` returns for options, or for ``inner="eager"`` where their budget is refused.

    Args:
        make: called with options and what a plan is to say of those that were not followed.

    Raises:
        BudgetError: that of the two that needs less; of the first alone if options are strict.
    """
    try:
        return make(options, ())
    except BudgetError as refusal:
        if options.inner == "eager" or options.strict:
            raise
        needed = format_bytes(refusal.required_bytes)
        note = f"operators run one by one, as in eager: generated code needs {needed}"
        try:
            return make(replace(options, inner="eager"), (note,))
        except BudgetError as other:
            raise min(refusal, other, key=lambda error: error.required_bytes) from None
