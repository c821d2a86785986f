"""budget.toml: what a model may take, and what it took when somebody last looked.

    [plan]                    # what to plan; options of the command line, with underscores
    model = "gpt2"
    batch = 8

    [limits]                  # any of memory_budget, peak and step_seconds
    peak = "8.50 GiB"

    [accepted]                # written by fxzero, from here to the end of the file
    peak = "8.21 GiB"
    step_seconds = 23.1

    [accepted.values]         # the largest at the peak: a line each, sorted, sizes rounded
    "lm_head mm, temporary" = { size = "1.53 GiB", count = 1, shape = "...", line = "gpt2.py:712" }

Text before ``[accepted]`` is the user's: only limits in it are ever changed, comments stay.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxzero.documents import naming, parse_toml, read_text
from fxzero.errors import PlanError, UsageError
from fxzero.plans import Plan, Value
from fxzero.report.folding import pattern
from fxzero.report.wording import printable, short_source
from fxzero.typed_data import read_value
from fxzero.units import format_bytes, parse_budget

_MAX_FILE_BYTES = 2**16  # twelve lines of values have about 4 KiB
_VALUES = 12  # are recorded, at most,
_SHARE = 0.01  # those with at least this share of the peak
_OWN = "[accepted]"
_HEAD = "# Checked by `fxzero plan --check`, which exits with 3 if the model takes more.\n"


@dataclass(frozen=True)
class Limits:
    """What a plan must not exceed.

    Attributes:
        memory_budget: what the plan is made for; the solver recomputes what that asks for.
        peak: the most that the plan may need, with or without a budget.
        step_seconds: the longest that a step may take, as it is modelled.
    """

    memory_budget: str | None = None
    peak: str | None = None
    step_seconds: float | None = None


@dataclass(frozen=True)
class Recorded:
    """Values of all layers at one place: their bytes, number, largest shape and source line."""

    size: str
    count: int
    shape: str
    line: str

    @property
    def bytes(self) -> int:
        return parse_budget(self.size) or 0


@dataclass(frozen=True)
class Accepted:
    """What a plan came to; ``values`` are by "place, role"."""

    peak: str
    step_seconds: float
    values: dict[str, Recorded]

    @property
    def unrecorded_bytes(self) -> int:
        """The most that a value can have taken which is not among the recorded."""
        if len(self.values) < _VALUES:
            return int(_SHARE * (parse_budget(self.peak) or 0))
        return min(value.bytes for value in self.values.values())

    @classmethod
    def of(cls, plan: Plan) -> Accepted:
        """What is recorded of a plan: its largest values, sorted by name."""
        found = recorded_values(plan.peak.alive)
        large = [name for name in found if found[name].bytes >= _SHARE * plan.peak_bytes]
        largest = sorted(large, key=lambda name: (-found[name].bytes, name))[:_VALUES]
        return cls(
            format_bytes(plan.peak_bytes),
            float(f"{plan.step_seconds:.3g}"),
            {name: found[name] for name in sorted(largest)},
        )


def recorded_values(values: tuple[Value, ...]) -> dict[str, Recorded]:
    """Values by "place, role", the same place in all layers as one."""
    groups: dict[str, list[Value]] = {}
    for value in filter(lambda value: value.bytes, values):
        groups.setdefault(f"{printable(pattern(value))}, {value.role}", []).append(value)
    result = {}
    for name, group in groups.items():
        largest = max(group, key=lambda value: value.bytes)
        line = printable(short_source(largest.source).partition(" ")[0])
        size = format_bytes(sum(value.bytes for value in group))
        result[name] = Recorded(size, len(group), printable(largest.shape), line)
    return result


@dataclass(frozen=True)
class BudgetFile:
    """A file as it was read; ``text`` is "" if there is none yet.

    Attributes:
        plan: options of the command line by their names in Python.
        accepted: None before the first ``--accept``.
    """

    path: Path
    text: str = ""
    plan: Mapping[str, Any] | None = None
    limits: Limits = Limits()
    accepted: Accepted | None = None

    @classmethod
    def read(cls, path: Path) -> BudgetFile:
        """Reads and checks a file.

        Raises:
            UsageError: it cannot be read, or holds anything else than what stands above.
        """
        text = read_text(path, _MAX_FILE_BYTES, UsageError)
        data = parse_toml(text, str(path), UsageError)
        with naming(path, UsageError):
            return cls._parse(path, text, data)

    @classmethod
    def _parse(cls, path: Path, text: str, data: dict[str, Any]) -> BudgetFile:
        for name in data.keys() - {"plan", "limits", "accepted"}:
            raise PlanError(f"unknown table {name!r}; known: plan, limits, accepted")
        given = data.get("limits", {})
        empty = {"memory_budget": None, "peak": None, "step_seconds": None}
        limits = read_value(
            Limits, {**empty, **given} if isinstance(given, dict) else given, "limits"
        )
        accepted = read_value(Accepted | None, data.get("accepted"), "accepted")
        plan = data.get("plan")
        if plan is not None and not isinstance(plan, dict):
            raise PlanError(f"plan must be an object, not {type(plan).__name__}")
        if "memory_budget" in (plan or {}):
            raise PlanError("plan.memory_budget belongs to the table [limits]")
        _check_numbers(limits, accepted)
        return cls(path, text, plan, limits, accepted)

    def updated(self, plan: Plan, options: Mapping[str, Any]) -> str:
        """The text with what ``plan`` takes accepted, and limits that it exceeds raised.

        Args:
            options: for the table [plan] of a new file.
        """
        limits = self.limits
        if plan.request.memory_budget is not None and not plan.fits:
            limits = replace(limits, memory_budget=_at_least(plan.minimum_budget))
        if limits.peak is not None and plan.peak_bytes > (parse_budget(limits.peak) or 0):
            limits = replace(limits, peak=_at_least(plan.peak_bytes))
        if limits.step_seconds is not None and plan.step_seconds > limits.step_seconds:
            limits = replace(limits, step_seconds=_seconds_at_least(plan.step_seconds))
        if not self.text and "memory_budget" in options:
            limits = Limits(memory_budget=options["memory_budget"])
        elif not self.text:
            limits = Limits(peak=_at_least(plan.peak_bytes))
        start = self._user_text(limits) if self.text else _new_text(options, limits)
        text = f"{start.rstrip()}\n\n{_accepted_text(Accepted.of(plan))}"
        read = BudgetFile._parse(self.path, text, parse_toml(text, str(self.path), UsageError))
        if read.limits != limits:  # written in a way that lines do not show
            raise UsageError(f"{self.path}: write each limit in a line of its own below [limits]")
        return text

    def _user_text(self, limits: Limits) -> str:
        """What stands before [accepted], with these limits."""
        lines, table = [], ""
        for line in self.text.splitlines():
            header = re.match(r"\s*(\[.*\])\s*(#.*)?$", line)
            if header:
                if table.startswith("[accepted") and not header[1].startswith("[accepted"):
                    raise UsageError(f"{self.path}: {header[1]} must stand before {_OWN}")
                table = header[1]
            if table.startswith("[accepted"):
                continue
            key = line.partition("=")[0].strip()
            value = getattr(limits, key, None) if key in vars(limits) else None
            if table == "[limits]" and value != getattr(self.limits, key, value):
                line = re.sub(
                    r"=\s*(\"[^\"]*\"|'[^']*'|[^\s#]+)", f"= {_toml(value)}", line, count=1
                )
            lines.append(line)
        return "\n".join(lines)


def _check_numbers(limits: Limits, accepted: Accepted | None) -> None:
    sizes = {"limits.memory_budget": limits.memory_budget, "limits.peak": limits.peak}
    seconds = {"limits.step_seconds": limits.step_seconds}
    if accepted is not None:
        sizes["accepted.peak"] = accepted.peak
        seconds["accepted.step_seconds"] = accepted.step_seconds
        sizes |= {f'accepted.values."{n}".size': v.size for n, v in accepted.values.items()}
    for name, size in sizes.items():
        try:
            # What a percentage means is known where the plan is made.
            parse_budget(size, 2**40 if name == "limits.memory_budget" else None)
        except UsageError:
            raise PlanError(f'{name}={size!r} must be a positive size such as "22GiB"') from None
    for name, value in (accepted.values if accepted else {}).items():
        if value.count < 1:
            raise PlanError(f'accepted.values."{name}".count={value.count} must be positive')
    for name, number in seconds.items():
        if number is not None and not 0 < number < math.inf:
            raise PlanError(f"{name}={number} must be a positive number of seconds")


def _at_least(size: int) -> str:
    """A size in three digits that is not below ``size``."""
    text = format_bytes(size)
    number, unit = text.split()
    step = 10.0 ** -len(number.partition(".")[2])
    while (parse_budget(text) or 0) < size:
        number = f"{float(number) + step:.{len(number.partition('.')[2])}f}"
        text = f"{number} {unit}"
    return text


def _seconds_at_least(seconds: float) -> float:
    digits = 2 - math.floor(math.log10(seconds))
    return round(math.ceil(seconds * 10.0**digits) / 10.0**digits, max(digits, 0))


def _new_text(options: Mapping[str, Any], limits: Limits) -> str:
    asked = {name: value for name, value in options.items() if name != "memory_budget"}
    given = {name: value for name, value in vars(limits).items() if value is not None}
    return "\n".join([_HEAD, _table("plan", asked), _table("limits", given)])


def _accepted_text(accepted: Accepted) -> str:
    values = "".join(
        f"{_toml(name)} = {{ {', '.join(f'{k} = {_toml(v)}' for k, v in vars(value).items())} }}\n"
        for name, value in accepted.values.items()
    )
    facts = {"peak": accepted.peak, "step_seconds": accepted.step_seconds}
    return f"{_table('accepted', facts)}\n[accepted.values]\n{values}"


def _table(name: str, values: Mapping[str, Any]) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: object) -> str:
    """A string, number or truth value: as JSON writes it, but for what TOML refuses."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
