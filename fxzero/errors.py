"""Every error that a user can cause, each with a code that the documentation explains.

The first line of a message says what is wrong and carries the numbers; the lines after it say
where, and what would work instead.  Bugs of ours are ``InternalError`` or plain ``assert``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from fxzero.units import format_bytes


class FxzeroError(Exception):
    """Base class: ``code`` is stable across versions and starts every message."""

    code = "FXZ000"

    def __init__(self, message: str) -> None:
        super().__init__(f"[{self.code}] {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.text,)

    @property
    def text(self) -> str:
        """The message without the code that it starts with."""
        return str(self).removeprefix(f"[{self.code}] ")


class UsageError(FxzeroError, ValueError):
    """An option or argument that cannot be right, whatever the model."""

    code = "FXZ101"


class BudgetError(FxzeroError):
    """No plan fits the memory budget.

    Attributes:
        budget_bytes: what was asked for.
        required_bytes: the smallest budget for which a plan is found, tight to the byte.
        fixed_bytes: what no decision can free (parameters, gradients, optimizer state, inputs).
        alternatives: changes that do fit, as (what to write, peak bytes) pairs.
    """

    code = "FXZ102"

    def __init__(
        self,
        *,
        budget_bytes: int,
        required_bytes: int,
        fixed: dict[str, int],
        alternatives: Iterable[tuple[str, int]] = (),
    ) -> None:
        self.budget_bytes = budget_bytes
        self.required_bytes = required_bytes
        self.fixed_bytes = sum(fixed.values())
        self.fixed = dict(fixed)
        self.alternatives = tuple(alternatives)
        lines = [
            f"no plan fits memory_budget={format_bytes(budget_bytes)} ({budget_bytes} bytes)",
            f"  smallest reachable peak  {format_bytes(required_bytes)} ({required_bytes} bytes),"
            " with recompute wherever it helps",
            f"  cannot be freed          {format_bytes(self.fixed_bytes)}: "
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in fixed.items() if size),
        ]
        if self.alternatives:
            lines.append("  any one of these fits")
            lines += [f"    {text}  ({format_bytes(peak)})" for text, peak in self.alternatives]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild_budget_error,
            (self.budget_bytes, self.required_bytes, self.fixed, self.alternatives),
        )


def _rebuild_budget_error(
    budget_bytes: int,
    required_bytes: int,
    fixed: dict[str, int],
    alternatives: tuple[tuple[str, int], ...],
) -> BudgetError:
    return BudgetError(
        budget_bytes=budget_bytes,
        required_bytes=required_bytes,
        fixed=fixed,
        alternatives=alternatives,
    )


class CaptureError(FxzeroError):
    """The model cannot be traced to one graph; the message names the user's own line."""

    code = "FXZ201"


class DeviceError(FxzeroError):
    """Inputs and parameters lie on different devices."""

    code = "FXZ202"


class RecompileLimitError(FxzeroError):
    """More distinct input shapes than ``model.recompile_limit`` allows."""

    code = "FXZ203"


class RuntimeStateError(FxzeroError, RuntimeError):
    """A compiled step was used in a way its graphs cannot serve (freed or modified values)."""

    code = "FXZ301"


class BackendOptionError(UsageError):
    """An option of ``torch.compile(backend="fxzero")`` that only ``fxzero.compile`` offers."""

    code = "FXZ401"


class PlanError(FxzeroError, ValueError):
    """A plan file that cannot be read, or that belongs to another graph."""

    code = "FXZ501"


class DivergenceError(FxzeroError, RuntimeError):
    """Ranks that train together were given inputs, models or plans that do not fit together."""

    code = "FXZ601"


class PeerError(FxzeroError, RuntimeError):
    """A collective failed: a rank that trains with this one is gone, or stuck, or has raised."""

    code = "FXZ602"


class CheckpointError(FxzeroError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another model."""

    code = "FXZ701"


class AlarmError(FxzeroError, RuntimeError):
    """A monitor stopped the training, on every rank."""

    code = "FXZ801"


class AlarmWarning(UserWarning):
    """A monitor saw something that should not be."""


class InternalError(FxzeroError):
    """A bug of ours.

    Attributes:
        reproducer: a directory that ``fxzero replay`` runs again, named at the message's end.
    """

    code = "FXZ901"

    def __init__(self, message: str, *, reproducer: Path | None = None) -> None:
        self.message = message
        self.reproducer = reproducer
        if reproducer is not None:
            message += f"\n  written to {reproducer}\n  run it again: fxzero replay {reproducer}"
        super().__init__(message)

    def with_reproducer(self, directory: Path) -> Self:
        """The same error, naming the directory."""
        return type(self)(self.message, reproducer=directory)


class GraphLawError(InternalError):
    """A pass left a graph that breaks the law of ``passes/spec.py``."""

    code = "FXZ902"


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0]


def described(error: BaseException) -> str:
    """An error of somebody else's in one line: 'KeyError: 'n_embd''."""
    return f"{type(error).__name__}: {first_line(error)}"


def listed(names: Sequence[str], most: int) -> str:
    """Names in one line: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unknown_option(name: str, known: Iterable[str], *, where: str) -> UsageError:
    """Error for an option name nobody knows, with the nearest known one."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return UsageError(f"{where}: unknown option {name!r}{hint}\n  known: {', '.join(known)}")
