"""Which of a model's parameters are one tensor under several names.

A graph has one gradient for each tensor.  What was tied when a model was compiled must stay so:
``to_empty`` and assignments break ties without a word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from torch import nn

Ties = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class TieChange:
    """Two names that were one parameter when the model was compiled and are two, or the reverse."""

    name: str
    other: str
    broken: bool

    def __str__(self) -> str:
        then, now = ("one parameter", "two") if self.broken else ("two parameters", "one")
        return f"{self.name} and {self.other} were {then} at compile, and are {now} now"


def ties_of(model: nn.Module) -> Ties:
    """Every pair of names that stand for one parameter."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return frozenset(pair for alike in names.values() for pair in combinations(alike, 2))


def changed_ties(before: Ties, now: Ties) -> Iterator[TieChange]:
    """What became of ties, sorted by name."""
    for name, other in sorted(before ^ now):
        yield TieChange(name, other, broken=(name, other) in before)
