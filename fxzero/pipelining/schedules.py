"""What each rank of a pipeline does in which order: forwards and backwards of its stages.

A schedule is the order in which a rank's stages take their turns, and how many micro-batches may be
in flight: before each backward the rank runs forwards until that many are.  Where the backward is
split, weight gradients (W), which nobody waits for, fill the waits between input gradients (I).

    1f1b, 2 ranks, 3 micro-batches      rank 0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
                                        rank 1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2
    zb1p                                rank 0: F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2
                                        rank 1: F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2

Interleaved: Narayanan et al., SC 2021.  ZB1P (there ZB-H1) and ZBV: Qi et al., ICLR 2024.
DualPipeV: DeepSeek-AI, 2025.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

from fxzero.errors import UsageError, unknown_option

NAMES = ("gpipe", "1f1b", "zb1p", "interleaved1f1b", "interleavedzb", "zbv", "dualpipev")
TWO_STAGES_A_RANK = ("interleaved1f1b", "interleavedzb", "zbv", "dualpipev")
_V_SHAPED = ("zbv", "dualpipev")
_SPLIT = ("zb1p", "interleavedzb", "zbv", "dualpipev")
_NO_LIMIT = float("inf")


class Kind(enum.StrEnum):
    """What is computed; a backward is input and weight gradients at once."""

    FORWARD = "F"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    BACKWARD = "B"


@dataclass(frozen=True)
class StageTimes:
    """How long one micro-batch takes in a stage, in seconds."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def total(self) -> float:
        """Seconds of all three."""
        return self.forward + self.input_gradient + self.weight_gradient

    def of(self, kind: Kind) -> float:
        """Seconds of one action."""
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.INPUT_GRADIENT:
                return self.input_gradient
            case Kind.WEIGHT_GRADIENT:
                return self.weight_gradient
            case Kind.BACKWARD:
                return self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class Action:
    """One computation of one stage for one micro-batch, "F1.3" for short."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @property
    def in_words(self) -> str:
        """It, for errors."""
        what = self.kind.name.lower().replace("_", " ")
        return f"the {what} of stage {self.stage} for micro-batch {self.microbatch}"

    @property
    def result(self) -> Action:
        """What others wait for: of a whole backward, the input gradient."""
        if self.kind is Kind.BACKWARD:
            return Action(Kind.INPUT_GRADIENT, self.stage, self.microbatch)
        return self

    def needs(self, stages: int) -> tuple[Action, ...]:
        """The results that it starts from, in a pipeline of so many stages."""
        stage, microbatch = self.stage, self.microbatch
        if self.kind is Kind.FORWARD:
            return (Action(Kind.FORWARD, stage - 1, microbatch),) if stage else ()
        if self.kind is Kind.WEIGHT_GRADIENT:
            return (Action(Kind.INPUT_GRADIENT, stage, microbatch),)
        own = Action(Kind.FORWARD, stage, microbatch)
        if stage == stages - 1:
            return (own,)
        return own, Action(Kind.INPUT_GRADIENT, stage + 1, microbatch)


@dataclass(frozen=True)
class Step:
    """An action of a rank, with the stage and the place of each that it needs."""

    rank: int
    action: Action
    needs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """One step of a pipeline.

    Attributes:
        name: one of ``NAMES``, or the caller's own.
        placement: the rank of each stage.
        microbatches: how many there are in a step.
        orders: what each rank does, in order.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    orders: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def splits_backward(self) -> bool:
        """Whether any input gradient is computed apart from its weight gradient."""
        return any(a.kind is Kind.INPUT_GRADIENT for order in self.orders for a in order)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in the order of the model."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def in_flight(self, stage: int) -> int:
        """The most micro-batches between a stage's forward and the end of its input gradient."""
        now = most = 0
        for action in self.orders[self.placement[stage]]:
            if action.stage == stage and action.kind is not Kind.WEIGHT_GRADIENT:
                now += 1 if action.kind is Kind.FORWARD else -1
                most = max(most, now)
        return most

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All actions in an order in which each comes after what it needs.

        Raises:
            UsageError: a rank would wait for ever.
        """
        found: list[Step] = []
        places: dict[Action, int] = {}
        done = [0] * self.ranks
        moved = True
        while moved:
            moved = False
            for rank, order in enumerate(self.orders):
                while done[rank] < len(order):
                    action = order[done[rank]]
                    needs = action.needs(self.stages)
                    if not all(need in places for need in needs):
                        break
                    places[action.result] = len(found)
                    found.append(Step(rank, action, tuple((n.stage, places[n]) for n in needs)))
                    done[rank] += 1
                    moved = True
        if len(found) < sum(map(len, self.orders)):
            raise _deadlock(self, done, places)
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join(
            f"rank {rank}: {' '.join(map(str, order))}" for rank, order in enumerate(self.orders)
        )


def _deadlock(schedule: Schedule, done: Sequence[int], ends: Mapping[Action, int]) -> UsageError:
    lines = [
        f"schedule {schedule.name!r} deadlocks after {sum(done)} of"
        f" {sum(map(len, schedule.orders))} actions: an action must come after all that it needs"
    ]
    for rank, (order, count) in enumerate(zip(schedule.orders, done, strict=True)):
        if count < len(order):
            missing = next(n for n in order[count].needs(schedule.stages) if n not in ends)
            lines.append(
                f"  rank {rank} waits for ever with {order[count]}, which needs {missing}"
                f" of rank {schedule.placement[missing.stage]}"
            )
    return UsageError("\n".join(lines))


def make_schedule(
    name: str,
    ranks: int,
    microbatches: int,
    stages: int | None = None,
    times: Sequence[StageTimes] | None = None,
) -> Schedule:
    """The schedule of that name.

    Args:
        name: one of ``NAMES``.
        microbatches: any number; with fewer than stages there are only more bubbles.
        stages: one a rank, or two for the interleaved and the V-shaped schedules, unless given.
        times: of each stage, to place weight gradients by; all equal unless given.

    Raises:
        UsageError: for an unknown name, and for numbers that do not fit together.
    """
    if name not in NAMES:
        raise unknown_option(name, NAMES, where="schedule")
    if stages is None:
        stages = 2 * ranks if name in TWO_STAGES_A_RANK else ranks
    _check(name, ranks, microbatches, stages)
    times = [StageTimes(1.0, 1.0, 1.0)] * stages if times is None else times
    check_times(times, stages)
    each = range(ranks)
    if name in _V_SHAPED:
        placement = tuple(min(stage, stages - 1 - stage) for stage in range(stages))
        orders = [_v(rank, ranks, microbatches, name == "dualpipev") for rank in each]
    elif name in TWO_STAGES_A_RANK:
        placement = tuple(stage % ranks for stage in range(stages))
        # A whole backward takes as long as two forwards, an input gradient as one.
        more = 1 if name in _SPLIT else 2
        orders = [_loop(rank, ranks, stages, microbatches, more) for rank in each]
    else:
        placement = tuple(stage * ranks // stages for stage in range(stages))
        in_flight = [microbatches if name == "gpipe" else ranks - rank for rank in each]
        orders = [_run(rank, placement, microbatches, in_flight[rank]) for rank in each]
    if name in _SPLIT:
        orders = _split(orders, times, [_Limits.of(name, rank, placement) for rank in each])
    if name == "dualpipev":
        orders = [_join(order) for order in orders]
    return Schedule(name, placement, microbatches, tuple(map(tuple, orders)))


def check_times(times: Sequence[StageTimes], stages: int) -> None:
    """Raises a UsageError unless there are times for each stage."""
    if len(times) != stages:
        raise UsageError(f"times of {len(times)} stages for a pipeline of {stages}: give one each")


def _check(name: str, ranks: int, microbatches: int, stages: int) -> None:
    for what, count in (("ranks", ranks), ("microbatches", microbatches)):
        if count < 1:
            raise UsageError(f"{what}={count}: a pipeline needs 1 at least")
    if stages < ranks:
        raise UsageError(
            f"{stages} stages leave some of {ranks} ranks without work\n"
            f"  cut the model into {ranks} stages or more, or use {stages} ranks"
        )
    if name in _V_SHAPED and stages != 2 * ranks:
        others = ", ".join(other for other in NAMES if other not in _V_SHAPED)
        raise UsageError(
            f"schedule {name!r} has two stages a rank: {2 * ranks} on {ranks} ranks, not {stages}\n"
            f"  cut the model into {2 * ranks} stages, or use one of {others}"
        )


def _run(rank: int, placement: Sequence[int], microbatches: int, in_flight: int) -> list[Action]:
    """The order of a rank whose stages follow each other, which act as one."""
    order = _alternate([rank] * microbatches, [rank] * microbatches, lambda _: in_flight)
    run = [stage for stage, owner in enumerate(placement) if owner == rank]
    return [
        Action(action.kind, stage, action.microbatch)
        for action in order
        for stage in (run if action.kind is Kind.FORWARD else reversed(run))
    ]


def _loop(rank: int, ranks: int, stages: int, microbatches: int, more: int) -> list[Action]:
    """The order of a rank whose stages lie a loop over all ranks apart, and take turns in rounds.

    A round has as many micro-batches as there are ranks, or somewhat more.  The last loop and the
    last round are planned in full, and then what does not exist is left out: ranks that fit
    together do so without it.

    Args:
        more: how many more are in flight than on the next rank.
    """
    loops = -(-stages // ranks)
    rounds = max(1, microbatches // ranks)
    width = -(-microbatches // rounds)
    turns = [stage for stage in range(rank, loops * ranks, ranks) for _ in range(width)]
    in_flight = (loops - 1) * width + more * (ranks - 1 - rank) + 1
    order = _alternate(turns * rounds, turns[::-1] * rounds, lambda _: in_flight)
    return [a for a in order if a.stage < stages and a.microbatch < microbatches]


def _v(rank: int, ranks: int, microbatches: int, overlap: bool) -> list[Action]:
    """The order of a rank with one stage on the way down the ranks, and one on the way up again.

    Forwards on the way down fill the time until the first one comes up; from then on both stages
    take turns, as if micro-batches never ended, and those that do not exist are left out.

    Args:
        overlap: keep one more in flight when they take turns.  Then a forward of one stage is next
            to a backward of the other, and one can compute while the other communicates.
    """
    down, up = rank, 2 * ranks - 1 - rank
    behind = ranks - rank
    turns = [down, up] * microbatches
    forwards = [down] * (2 * behind - 1) + [up, down] * rank + [up] * behind + turns
    backwards = [up] * behind + turns

    def in_flight(done: int) -> int:
        return 2 * ranks + (overlap and done >= behind - 1)

    order = _alternate(forwards, backwards, in_flight)
    return [action for action in order if action.microbatch < microbatches]


def _alternate(
    forwards: Iterable[int], backwards: Iterable[int], in_flight: Callable[[int], int]
) -> list[Action]:
    """Forwards and backwards of one rank, merged.

    Args:
        forwards, backwards: whose turn it is; a stage takes its micro-batches one by one.
        in_flight: how many forwards are ahead of the backwards when so many of these are done.
    """
    coming = deque(_numbered(Kind.FORWARD, forwards))
    order: list[Action] = []
    started = 0
    for done, backward in enumerate(_numbered(Kind.BACKWARD, backwards)):
        while coming and started - done < in_flight(done):
            order.append(coming.popleft())
            started += 1
        order.append(backward)
    return order


def _numbered(kind: Kind, stages: Iterable[int]) -> Iterator[Action]:
    turns: Counter[int] = Counter()
    for stage in stages:
        yield Action(kind, stage, turns[stage])
        turns[stage] += 1


@dataclass(frozen=True)
class _Limits:
    """What a rank may keep for weight gradients, in micro-batches of one stage.

    Attributes:
        waiting: weight gradients that can run.
        held: these, and what is in flight.
    """

    waiting: float
    held: float

    @classmethod
    def of(cls, name: str, rank: int, placement: Sequence[int]) -> _Limits:
        """Nobody keeps more than the first rank has in flight (DualPipeV: one more)."""
        if name in _V_SHAPED:
            return cls(_NO_LIMIT, len(placement) + (name == "dualpipev"))
        return cls(rank * (placement.count(rank) if name == "zb1p" else 1), _NO_LIMIT)


def _split(
    orders: Sequence[Sequence[Action]], times: Sequence[StageTimes], limits: Sequence[_Limits]
) -> list[list[Action]]:
    """Splits all backwards, and puts weight gradients where a rank would wait or must free some."""
    ends: dict[Action, float] = {}
    split: list[list[Action]] = [[] for _ in orders]
    plays = list(map(_play, orders, limits, split, repeat(times), repeat(ends)))
    while plays:
        known = len(ends)
        plays = [play for play in plays if next(play, None) is not None]
        assert len(ends) > known
    return split


def _play(
    order: Sequence[Action],
    limits: _Limits,
    split: list[Action],
    times: Sequence[StageTimes],
    ends: dict[Action, float],
) -> Iterator[Action]:
    """Plays one rank into ``split`` and ``ends``; yields a need until its end is known."""
    now, held = 0.0, 0
    waiting: deque[Action] = deque()
    for action in (action.result for action in order):
        forward = action.kind is Kind.FORWARD
        ready = 0.0
        for need in action.needs(len(times)):
            while need not in ends:
                yield need
            ready = max(ready, ends[need])
        while waiting and (
            len(waiting) > limits.waiting
            or (forward and held >= limits.held)
            # In a shorter wait, it would delay more than it fills.
            or 0 < ready - now >= times[waiting[0].stage].weight_gradient / 2
        ):
            now += times[waiting[0].stage].weight_gradient
            split.append(waiting.popleft())
            held -= 1
        now = ends[action] = max(now, ready) + times[action.stage].of(action.kind)
        split.append(action)
        if forward:
            held += 1
        else:
            waiting.append(Action(Kind.WEIGHT_GRADIENT, action.stage, action.microbatch))
    split.extend(waiting)


def _join(order: Iterable[Action]) -> list[Action]:
    """Makes one backward of an input gradient whose weight gradient comes next."""
    joined: list[Action] = []
    for action in order:
        if action.kind is Kind.WEIGHT_GRADIENT:
            whole = Action(Kind.BACKWARD, action.stage, action.microbatch)
            if joined[-1] == whole.result:
                joined[-1] = whole
                continue
        joined.append(action)
    return joined
