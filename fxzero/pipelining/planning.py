"""Chooses where to cut a model into stages, so that each rank fits its budget.

Units of a row are runs of operators between the narrowest places; ``balance.py`` finds the cuts of
the least modelled time among them, and of its best ones the simulator, which knows the schedule,
chooses.  Where several stages share a rank, cuts then move as long as the simulated step gets
faster.

    no budget, or enough      the fastest stages
    less                      time counts what stages recompute to fit (``footprint.py``)
    too little for any cut    the stages whose largest need is least
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, reduce
from itertools import pairwise

import numpy as np

from fxzero.cost import CostModel
from fxzero.errors import UsageError
from fxzero.options import Options
from fxzero.pipelining.balance import Seconds, partition
from fxzero.pipelining.footprint import Footprint, Levels, StageBytes
from fxzero.pipelining.places import hinted_cuts, module_at, named_cuts, narrow_cuts
from fxzero.pipelining.profile import profile
from fxzero.pipelining.schedules import Schedule, StageTimes, make_schedule
from fxzero.pipelining.simulation import Simulation, simulate
from fxzero.pipelining.stages import Exports, tensors_of

# How many of the best cuts the simulator plays.
_CANDIDATES = 8
# How many moves of a cut are tried where stages share ranks.
_MOVES = 200
_NEVER = float("inf")
# So many micro-batches that only the largest stage counts.
_MANY = 10**6


@dataclass(frozen=True)
class Choice:
    """Where a model is cut.

    Attributes:
        cuts: positions in the row of operators.
        begins: for each stage, the module that its first operator runs in.
        times: of each stage, modelled, with what it recomputes.
        transfers: seconds between a stage and the next, if they are on different ranks.
    """

    cuts: tuple[int, ...]
    begins: tuple[str, ...]
    times: tuple[StageTimes, ...]
    transfers: tuple[float, ...]

    def schedule(self, name: str, ranks: int, microbatches: int) -> Schedule:
        """What each rank does."""
        return make_schedule(name, ranks, microbatches, len(self.times), self.times)

    def simulated(self, schedule: Schedule) -> Simulation:
        """When it does that."""
        return simulate(schedule, self.times, self.transfers)

    def with_recompute(self, seconds: Sequence[float]) -> Choice:
        """The same with stages that compute some values again, in their input gradients."""
        times = tuple(
            replace(each, input_gradient=each.input_gradient + more)
            for each, more in zip(self.times, seconds, strict=True)
        )
        return replace(self, times=times)

    def to_json(self) -> str:
        """Text for ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Choice:
        """What another rank chose."""
        data = json.loads(text)
        return cls(
            cuts=tuple(data["cuts"]),
            begins=tuple(data["begins"]),
            times=tuple(StageTimes(**each) for each in data["times"]),
            transfers=tuple(data["transfers"]),
        )


class Chooser:
    """Chooses cuts of one model and one size of micro-batch, for any schedule.

    Args:
        options: whose budget each rank keeps to.
        costs: prices of operators.
    """

    def __init__(self, exports: Exports, options: Options, costs: CostModel) -> None:
        self.exports, self.options, self.costs = exports, options, costs
        self.row = exports.row
        self.profile = profile(exports, options.inner, costs)
        self._levels = cache(lambda: Levels.of(self.profile, options, costs))

    def under(self, options: Options) -> Chooser:
        """The same for another budget or sharding."""
        other = copy.copy(self)
        other.options = options
        other.costs = replace(self.costs, mesh=options.ranks)
        vars(other).pop("footprint", None)
        return other

    @cached_property
    def footprint(self) -> Footprint:
        """What the model's stages hold."""
        tensors = tensors_of(self.exports.exported.forward)
        return Footprint(self.row, tensors, self.options, self._levels)

    @cached_property
    def bytes_across(self) -> dict[int, int]:
        """What a micro-batch sends over each place to cut."""
        return {cut: self.row.bytes_across(cut) for cut in self.row.cuts}

    def send(self, cut: int) -> float:
        """The seconds that it takes; none at the ends."""
        if cut not in self.bytes_across:
            return 0.0
        along, count = self.costs.route("pp"), len(self.row.values_across(cut))
        return max(count - 1, 0) * along.send(0) + along.send(self.bytes_across[cut])

    def choices(
        self,
        name: str,
        ranks: int,
        stages: int,
        microbatches: int,
        modules: Sequence[str] = (),
        held: int = 0,
    ) -> Iterator[Choice]:
        """The cuts whose step takes the least time, by the model; then those that need the least.

        Where a budget is tight, the first may turn out not to fit.

        Args:
            name: of the schedule.
            modules: submodules before which to cut instead.
            held: bytes that every rank holds besides.

        Raises:
            UsageError: the model has fewer places to cut than stages, or cannot be cut there.
        """
        if stages - 1 > len(self.row.cuts):
            raise UsageError(
                f"{self.exports.name} cannot be cut into {stages} stages: it has "
                f"{len(self.row.cuts)} places to cut\n"
                f"  ask for {len(self.row.cuts) + 1} stages or fewer"
            )
        search = _Search(self, name, ranks, stages, microbatches)
        if modules:
            yield search.played(named_cuts(self.exports, modules), None)[1]
            return
        budget = self.options.memory_budget
        best = search.best(None if budget is None else budget - held)
        yield best
        if budget is not None and (other := search.smallest()).cuts != best.cuts:
            yield other

    @cached_property
    def bounds(self) -> list[int]:
        """Where units begin, and the end: places that pass few bytes, spread over the row's time.

        Where the model's authors would cut it (``hinted_cuts``) units begin, too.
        """
        narrow = narrow_cuts(self.profile, self.bytes_across)
        return [0, *sorted({*narrow, *hinted_cuts(self.exports)}), len(self.row.work)]


class _Search:
    """Cuts for one schedule."""

    def __init__(
        self, chooser: Chooser, name: str, ranks: int, stages: int, microbatches: int
    ) -> None:
        self.chooser = chooser
        self.name, self.ranks, self.stages = name, ranks, stages
        self.microbatches = microbatches
        self.usual = make_schedule(name, ranks, microbatches, stages)
        bounds = chooser.bounds
        if len(bounds) <= stages:
            bounds = [0, *chooser.row.cuts, len(chooser.row.work)]
        self.bounds = bounds
        self.played = cache(self._play)
        self.stage = cache(self._stage)

    def best(self, room: int | None) -> Choice:
        """The fastest that fits, as far as is known.

        Args:
            room: bytes that a rank has for its stages; None: any.
        """
        _, choice = self._fastest(lambda start, stop, _: self._seconds(start, stop), None)
        if room is None or self._recompute(choice, room) == (0.0,) * self.stages:
            return choice

        def within(start: int, stop: int, in_flight: int) -> float:
            """With what a stage recomputes to fit its share of the rank's room."""
            stage = self.stage(self.bounds[start], self.bounds[stop])
            share = room * self.ranks // self.stages
            return self._seconds(start, stop) + _recompute([(stage, in_flight)], share)[0]

        seconds, choice = self._fastest(within, room)
        return choice if seconds < _NEVER else self.smallest()

    def _fastest(self, seconds: Seconds, room: int | None) -> tuple[float, Choice]:
        """The best of the best partitions by the simulator; infinite seconds if there is none."""
        found = self._partitions(seconds, self.microbatches, _CANDIDATES)
        if not found:
            return _NEVER, Choice((), (), (), ())
        best = min((self.played(cuts, room) for cuts in found), key=_rank)
        return best if self.stages == self.ranks else self._moved(best, room)

    def _partitions(self, seconds: Seconds, microbatches: int, keep: int) -> list[tuple[int, ...]]:
        found = partition(
            len(self.bounds) - 1,
            self.stages,
            microbatches,
            seconds,
            keep=keep,
            in_flight=lambda k: self.usual.in_flight(self.stages - k),
        )
        return [tuple(self.bounds[unit] for unit in each.cuts) for each in found]

    def _moved(self, best: tuple[float, Choice], room: int | None) -> tuple[float, Choice]:
        """Moves one cut at a time to where the step is faster, until none is."""
        tried, moved = 0, True
        while moved and tried < _MOVES:
            moved = False
            for cuts in self._neighbours(best[1].cuts):
                tried += 1
                other = self.played(cuts, room)
                if other[0] < best[0]:
                    best, moved = other, True
                    break
        return best

    def _neighbours(self, cuts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """With one cut a unit, or four, further to the left or right."""
        places = [self.bounds.index(cut) for cut in cuts]
        for index, place in enumerate(places):
            for step in (-4, -1, 1, 4):
                other = [*places[:index], place + step, *places[index + 1 :]]
                edges = [0, *other, len(self.bounds) - 1]
                if all(a < b for a, b in pairwise(edges)):
                    yield tuple(self.bounds[at] for at in other)

    def smallest(self) -> Choice:
        """The cuts of the smallest need, for a budget that none is known to fit."""

        def need(start: int, stop: int, in_flight: int) -> float:
            stage = self.stage(self.bounds[start], self.bounds[stop])
            return float((stage.static + in_flight * stage.saved + stage.working).min())

        (cuts,) = self._partitions(need, _MANY, 1)
        return self.played(cuts, None)[1]

    def _seconds(self, start: int, stop: int) -> float:
        chooser, bounds = self.chooser, self.bounds
        times = chooser.profile.times(bounds[start], bounds[stop])
        return times.total + chooser.send(bounds[start]) + chooser.send(bounds[stop])

    def _stage(self, start: int, stop: int) -> StageBytes:
        received = self.chooser.bytes_across.get(start, 0)
        return self.chooser.footprint.stage(start, stop, received)

    def _play(self, cuts: tuple[int, ...], room: int | None) -> tuple[float, Choice]:
        """What the simulator says of cuts; infinite seconds if a rank has no room."""
        chooser = self.chooser
        spans = list(pairwise([0, *cuts, len(chooser.row.work)]))
        choice = Choice(
            cuts,
            tuple(module_at(chooser.row.work[start]) for start, _ in spans),
            tuple(chooser.profile.times(start, stop) for start, stop in spans),
            tuple(chooser.send(cut) for cut in cuts),
        )
        if room is not None:
            more = self._recompute(choice, room)
            if _NEVER in more:
                return _NEVER, choice
            choice = choice.with_recompute(more)
        schedule = choice.schedule(self.name, self.ranks, self.microbatches)
        return choice.simulated(schedule).step_seconds, choice

    def _recompute(self, choice: Choice, room: int) -> tuple[float, ...]:
        """Seconds that each stage recomputes for a micro-batch, so that its rank fits."""
        spans = list(pairwise([0, *choice.cuts, len(self.chooser.row.work)]))
        schedule = choice.schedule(self.name, self.ranks, self.microbatches)
        found = [0.0] * self.stages
        for mine in map(schedule.stages_of, range(self.ranks)):
            held = [(self.stage(*spans[stage]), schedule.in_flight(stage)) for stage in mine]
            for stage, seconds in zip(mine, _recompute(held, room), strict=True):
                found[stage] = seconds
        return tuple(found)


def _recompute(stages: Sequence[tuple[StageBytes, int]], room: int) -> list[float]:
    """Seconds a micro-batch that each of a rank's stages recomputes; infinite if none fits.

    Args:
        stages: with the number of micro-batches that each has in flight.
    """
    if not stages:
        return []
    need = sum(stage.static + held * stage.saved for stage, held in stages)
    working = reduce(np.maximum, (stage.working for stage, _ in stages))
    levels = (need + working <= room).nonzero()[0]
    if not len(levels):
        return [_NEVER] * len(stages)
    return [float(stage.seconds[levels[0]]) for stage, _ in stages]


def _rank(played: tuple[float, Choice]) -> tuple[float, tuple[int, ...]]:
    return played[0], played[1].cuts
