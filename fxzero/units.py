"""Bytes, seconds and counts as people write and read them.

``parse_budget`` accepts what the public surface promises ("22GiB", an int, "90%") and refuses a
bare fraction, which other tools read as a share of a maximum that nobody can see.
"""

from __future__ import annotations

import math
import re

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_QUANTITY = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")
_WHOLE = re.compile(r"\s*-?[0-9]+\s*")
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_LONGEST = 40  # characters of the longest quantity that anybody writes; a float holds them
_EXPECTED = 'write "22GiB", "800MB", "90%" of the device, or a whole number of bytes'


def parse_budget(budget: object, device_bytes: int | None = None) -> int | None:
    """Bytes meant by ``memory_budget``; None stays None (no limit).

    Args:
        budget: bytes as a number or its text, a quantity with a unit, or a percentage of the
            device's memory.
        device_bytes: what "100%" means; percentages need it.

    Raises:
        UsageError: for anything malformed, not finite, negative, zero, or a bare fraction.
    """
    from fxzero.errors import UsageError

    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise UsageError(f"memory_budget={budget!r} is not a number of bytes: {_EXPECTED}")
    if isinstance(budget, float):
        return _parse_float(budget)
    if isinstance(budget, str) and len(budget) > _LONGEST:
        raise UsageError(f"memory_budget={budget[:20]!r}... is malformed: {_EXPECTED}")
    if isinstance(budget, int):
        if budget <= 0:
            raise UsageError(f"memory_budget={budget} must be positive: {_EXPECTED}")
        return budget
    if _WHOLE.fullmatch(budget):
        return parse_budget(int(budget))
    if match := _PERCENT.fullmatch(budget):
        return _parse_percent(budget, float(match.group(1)), device_bytes)
    match = _QUANTITY.fullmatch(budget)
    if match is None or match.group(2).lower() not in _UNITS:
        raise UsageError(f"memory_budget={budget!r} is malformed: {_EXPECTED}")
    size = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if size <= 0:
        raise UsageError(f"memory_budget={budget!r} must be positive: {_EXPECTED}")
    return size


def _parse_float(budget: float) -> int:
    from fxzero.errors import UsageError

    if not math.isfinite(budget):
        raise UsageError(f"memory_budget={budget} is not a finite number of bytes: {_EXPECTED}")
    if 0 <= budget <= 1:
        raise UsageError(
            f"memory_budget={budget} looks like a fraction, and fractions have no meaning here: "
            f"{_EXPECTED}"
        )
    if budget <= 0 or budget != int(budget):
        raise UsageError(
            f"memory_budget={budget} must be a positive whole number of bytes: {_EXPECTED}"
        )
    return int(budget)


def _parse_percent(text: str, percent: float, device_bytes: int | None) -> int:
    from fxzero.errors import UsageError

    if not 0 < percent <= 100:
        raise UsageError(f"memory_budget={text!r} must lie above 0% and at most 100%")
    if device_bytes is None:
        raise UsageError(f"memory_budget={text!r}: the device's memory is not known here")
    return int(device_bytes * percent / 100)


def format_bytes(size: float) -> str:
    """'1.50 GiB': three significant digits, binary units, sign kept."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.{_decimals(size)}f} {unit}"
        size /= 1024
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """'12.3 ms', '4.56 s': three significant digits; '0 s'."""
    if not seconds:
        return "0 s"
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if abs(seconds) < 1000 * scale:
            return f"{seconds / scale:.{_decimals(seconds / scale)}f} {unit}"
    return f"{seconds:.{_decimals(seconds)}f} s"


def format_count(count: float) -> str:
    """'8.03 B', '124 M': three significant digits."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.{_decimals(count / scale)}f} {unit}"
    return f"{count:.0f}"


def _decimals(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
