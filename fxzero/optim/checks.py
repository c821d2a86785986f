"""Checks of hyperparameters, with what would be right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fxzero.errors import UsageError


def check_not_negative(group: Mapping[str, Any], *names: str) -> None:
    """Raises a UsageError for the first of these options that is negative or not finite."""
    for name in names:
        value = group[name]
        if not (math.isfinite(float(value)) and float(value) >= 0):
            raise UsageError(f"{name}={value} must be a finite number, at least 0")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises a UsageError unless there are two shares below 1."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"betas={betas} must be two numbers, at least 0 and below 1")
