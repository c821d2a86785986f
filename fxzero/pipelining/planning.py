"""Chooses where to cut a model into stages.

Units of a row are runs of operators between the narrowest places; ``balance.py`` finds the cuts of
the least modelled time among them, and of its best ones the simulator, which knows the schedule,
chooses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from torch import fx

from fxzero.cost import CostModel
from fxzero.errors import UsageError, unknown_option
from fxzero.pipelining.balance import partition
from fxzero.pipelining.profile import Profile, profile
from fxzero.pipelining.schedules import StageTimes, make_schedule
from fxzero.pipelining.simulation import simulate
from fxzero.pipelining.stages import Exports

# More units than that make the choice slower and no better.
_UNITS = 160
# How many of the best cuts the simulator plays.
_CANDIDATES = 8


@dataclass(frozen=True)
class Choice:
    """Where a model is cut.

    Attributes:
        cuts: positions in the row of operators.
        times: of each stage, modelled.
        seconds: the modelled time of a step.
        bubble: the share of it in which ranks are idle.
    """

    cuts: tuple[int, ...]
    times: tuple[StageTimes, ...]
    seconds: float
    bubble: float

    def to_json(self) -> str:
        """Text for ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Choice:
        """What another rank chose."""
        data = json.loads(text)
        times = tuple(StageTimes(**each) for each in data["times"])
        return cls(tuple(data["cuts"]), times, data["seconds"], data["bubble"])


def choose_cuts(
    exports: Exports,
    *,
    name: str,
    ranks: int,
    stages: int,
    microbatches: int,
    inner: str,
    costs: CostModel,
    modules: Sequence[str] = (),
) -> Choice:
    """The cuts whose step takes the least time, by the model.

    Args:
        name: of the schedule.
        modules: submodules before which to cut instead.

    Raises:
        UsageError: the model has fewer places to cut than stages, or cannot be cut there.
    """
    row, prices = exports.row, profile(exports, inner, costs)
    if stages - 1 > len(row.cuts):
        raise UsageError(
            f"{exports.name} cannot be cut into {stages} stages: it has {len(row.cuts)} places to "
            f"cut\n  ask for {len(row.cuts) + 1} stages or fewer"
        )
    bytes_across = {cut: row.bytes_across(cut) for cut in row.cuts}
    link = costs.hardware

    def send(cut: int) -> float:
        if cut not in bytes_across:
            return 0.0
        return len(row.values_across(cut)) * link.latency + bytes_across[cut] / link.network

    def played(cuts: tuple[int, ...]) -> Choice:
        return _play(prices, cuts, name, ranks, microbatches, [send(cut) for cut in cuts])

    if modules:
        return played(named_cuts(exports, modules))
    narrow = _narrow(prices, bytes_across)
    bounds = [0, *(narrow if len(narrow) >= stages - 1 else row.cuts), len(row.work)]
    transfer = [send(bound) for bound in bounds]

    def seconds(start: int, stop: int, in_flight: int) -> float:
        work = prices.times(bounds[start], bounds[stop]).total
        return work + transfer[start] + transfer[stop]

    found = partition(len(bounds) - 1, stages, microbatches, seconds, keep=_CANDIDATES)
    choices = [played(tuple(bounds[unit] for unit in candidate.cuts)) for candidate in found]
    return min(choices, key=lambda choice: (choice.seconds, choice.cuts))


def _play(
    prices: Profile,
    cuts: Sequence[int],
    name: str,
    ranks: int,
    microbatches: int,
    transfers: Sequence[float],
) -> Choice:
    """What the simulator says of cuts."""
    bounds = [0, *cuts, len(prices.forward) - 1]
    times = tuple(prices.times(start, stop) for start, stop in pairwise(bounds))
    schedule = make_schedule(name, ranks, microbatches, len(times), times)
    played = simulate(schedule, times, transfers)
    return Choice(tuple(cuts), times, played.step_seconds, played.bubble)


def _narrow(prices: Profile, bytes_across: dict[int, int]) -> list[int]:
    """Places to cut, in order: those that pass the least bytes, spread over the time of the row."""
    if len(bytes_across) < _UNITS:
        return sorted(bytes_across)
    total = prices.times(0, len(prices.forward) - 1).total
    best: dict[int, int] = {}
    for cut, size in sorted(bytes_across.items()):
        share = int(_UNITS * prices.times(0, cut).total / total)
        if share not in best or size < bytes_across[best[share]]:
            best[share] = cut
    return sorted(best.values())


def named_cuts(exports: Exports, names: Sequence[str]) -> tuple[int, ...]:
    """The cuts before the first operators of some submodules.

    Raises:
        UsageError: a module that runs no operator, or before which the model cannot be cut.
    """
    row = exports.row
    first: dict[str, int] = {}
    for position, node in enumerate(row.work):
        for module in modules_of(node):
            first.setdefault(module, position)
    cuts = []
    for name in names:
        if name not in first:
            raise unknown_option(name, sorted(first), where="Pipeline.cuts")
        if first[name] not in row.cuts:
            raise UsageError(
                f"Pipeline.cuts: {exports.name} cannot be cut before {name}, where it begins or "
                "where memory is written to later on\n  name a module further down"
            )
        cuts.append(first[name])
    if cuts != sorted(set(cuts)):
        raise UsageError(f"Pipeline.cuts: {', '.join(names)} do not run in this order")
    return tuple(cuts)


def modules_of(node: fx.Node) -> list[str]:
    """The modules that an operator runs in, by their names in the model, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return [path.removeprefix("model.") for path in paths if path.startswith("model.")]
