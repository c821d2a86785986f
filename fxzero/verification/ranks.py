"""What the ranks of a verification say to each other; one device talks to itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxzero.agreement import Agreement


def told(agreement: Agreement | None, value: Any) -> list[Any]:
    """What every rank says, in the order of ``agreement.ranks``; all ranks call it."""
    return [value] if agreement is None else agreement.told_by_all(value, "verification")


def on_any_rank(agreement: Agreement | None, fact: bool) -> bool:
    """Whether something holds on this rank or another; all ranks call it."""
    return any(told(agreement, fact))


def failed_ranks(agreement: Agreement | None, ok: Sequence[bool]) -> tuple[int, ...]:
    """The global numbers of the ranks that said that they are not in order."""
    ranks = [0] if agreement is None else agreement.ranks
    return tuple(rank for rank, fine in zip(ranks, ok, strict=True) if not fine)
