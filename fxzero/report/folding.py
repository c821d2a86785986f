"""Equal layers as one row: "transformer.h.0-11.mlp gelu (x12)" instead of twelve rows.

Values fold into one row when role, bytes, shape, source line and operator are equal, and module
and reason differ in nothing but numbers:

    h.0.mlp gelu    75 MiB  saved        h.0-2.mlp gelu (x3)  225 MiB  saved
    h.1.mlp gelu_1  75 MiB  saved   ->
    h.2.mlp gelu_2  75 MiB  saved
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fxzero.plans import Value

# A whole component of a path: the 3 of "h.3.mlp", not that of "conv3".
_LAYER = re.compile(r"(?:^|(?<=\.))\d{1,9}(?=[. ]|$)")  # no model has more layers
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# What tells operators and parameters of one module apart: "mul_3", "primals_7_gathered".
_COPY = re.compile(r"_\d+(?=$| workspace$|_gathered$)")


@dataclass(frozen=True)
class Row:
    """Values that differ only in their layer.

    Attributes:
        place: module and operator, with ranges for layer numbers: "h.0-11.mlp gelu".
        count: how many values.
        bytes: of one value.
        seconds: of computing all of them again.
        first, last: from the first instant of any to the last; -1: not known.
    """

    place: str
    count: int
    bytes: int
    shape: str
    source: str
    role: str
    reason: str
    seconds: float
    first: int = -1
    last: int = -1

    @property
    def total_bytes(self) -> int:
        return self.count * self.bytes

    @property
    def label(self) -> str:
        return f"{self.place} (x{self.count})" if self.count > 1 else self.place


def fold(values: Iterable[Value]) -> tuple[Row, ...]:
    """One row for all values that differ only in their layer; largest total first."""
    groups: dict[tuple[object, ...], list[Value]] = {}
    for value in values:
        reason = _NUMBER.sub("#", value.reason)
        key = (value.role, value.bytes, value.shape, pattern(value), value.source, reason)
        groups.setdefault(key, []).append(value)
    rows = [_row(group) for group in groups.values()]
    return tuple(sorted(rows, key=lambda row: -row.total_bytes))


def pattern(value: Value) -> str:
    """Where a value comes from, without its layer: "h.#.mlp gelu"."""
    return _LAYER.sub("#", _place(value))


def _place(value: Value) -> str:
    """'h.0.mlp gelu', or the value's own name where that holds the module already."""
    name, module = value.name, value.module
    if not module:
        return _COPY.sub("", name)
    if name == module or name.startswith(f"{module}."):
        return name
    return f"{module} {_COPY.sub('', name)}"


def _row(group: Sequence[Value]) -> Row:
    first = group[0]
    single = len(group) == 1 and not first.module
    return Row(
        place=first.name if single else _merge([_place(value) for value in group], _LAYER, _ranges),
        count=len(group),
        bytes=first.bytes,
        shape=first.shape,
        source=first.source,
        role=first.role,
        reason=_merge([value.reason for value in group], _NUMBER, _span),
        seconds=sum(value.seconds for value in group),
        first=min((value.first for value in group if value.first >= 0), default=-1),
        last=max(value.last for value in group),
    )


def _merge(
    texts: Sequence[str], number: re.Pattern[str], combine: Callable[[Sequence[str]], str]
) -> str:
    """Texts that are equal but for their numbers as one text."""
    columns = zip(*(number.findall(text) for text in texts), strict=True)
    combined = iter([combine(column) for column in columns])
    return number.sub(lambda _: next(combined), texts[0])


def _ranges(numbers: Sequence[str]) -> str:
    """'0-11', '0,2-5'; more than three pieces become '0..11', which says nothing of the inside."""
    pieces: list[list[int]] = []
    for number in sorted({int(number) for number in numbers}):
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    if len(pieces) > 3:
        return f"{pieces[0][0]}..{pieces[-1][-1]}"
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in pieces)


def _span(numbers: Sequence[str]) -> str:
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if float(low) == float(high) else f"{low}-{high}"
