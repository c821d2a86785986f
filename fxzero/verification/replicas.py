"""Whether ranks that should have the same parameters have them, by hashes of every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxzero.ranks import Ranks
from fxzero.sharding import is_cut
from fxzero.verification.ranks import told
from fxzero.verification.values import fingerprint


@dataclass(frozen=True)
class StaleRank:
    """A rank that has not the parameters of the others.

    Attributes:
        rank: its global number.
        parameter: the first that differs.
        count: how many differ.
        of: how many were compared.
        like: a rank that has what most have; where that is undecided, the first rank.
    """

    rank: int
    parameter: str
    count: int
    of: int
    like: int

    def __str__(self) -> str:
        others = "" if self.count == 1 else f", the first of {self.count} of {self.of} parameters"
        return f"rank {self.rank} has another {self.parameter} than rank {self.like}{others}"


def stale_ranks(model: nn.Module, ranks: Ranks) -> tuple[StaleRank, ...]:
    """Ranks whose parameters differ from those that should be the same; all ranks must call it.

    Whole parameters are compared over all ranks, parts of cut ones over ranks with the same part.
    """
    mine = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # another stage of the pipeline has it
            continue
        place = ranks.shards.rank if is_cut(parameter) else -1
        mine[name] = (place, fingerprint(parameter))
    every = told(ranks.agreement, mine)
    return tuple(_differing(dict(zip(ranks.agreement.ranks, every, strict=True))))


_Hashes = Mapping[str, tuple[int, bytes]]


def _differing(said: Mapping[int, _Hashes]) -> Iterator[StaleRank]:
    for rank, hashes in said.items():
        models = {name: _model(said, name, place) for name, (place, _) in hashes.items()}
        wrong = [name for name, like in models.items() if said[like][name] != hashes[name]]
        if wrong:
            yield StaleRank(rank, wrong[0], len(wrong), len(hashes), models[wrong[0]])


def _model(said: Mapping[int, _Hashes], name: str, place: int) -> int:
    """The first rank with the most frequent value of a parameter's part."""
    alike: Sequence[int] = [rank for rank, hashes in said.items() if hashes[name][0] == place]
    values = Counter(said[rank][name] for rank in alike)
    most = max(values.values())
    return next(rank for rank in alike if values[said[rank][name]] == most)
