"""What one way to train takes: seconds of a step and bytes of the rank that needs most.

Operators of a stage and its collectives are played against each other, unit by unit: a gather
starts when what the last but one was for begins, a reduction when its gradients are there, and
links carry one collective after the other.  Stages are then played by their schedule, for as many
micro-batches as fill the pipeline; the others follow at the pace of the slowest rank.

    operators   | unit 1 | unit 2 |.| unit 3 |         "." : waits for links
    links       | g1 | g2 |  g3     |  ...

Bytes are weights, gradients and states as ZeRO spreads them, what micro-batches in flight leave for
their backward at the first of the solver's levels that fits, and what operators and gathers need
besides.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fxzero.cluster.sketch import Numbers, Sketch, StageSketch
from fxzero.cluster.ways import Way
from fxzero.hardware import Hardware
from fxzero.network import route
from fxzero.pipelining.schedules import Schedule, StageTimes, make_schedule
from fxzero.pipelining.simulation import step_seconds
from fxzero.quantization import QUANTUM, wire_bytes

# Collectives of a kind that are under way beside operators, as in plans.
_IN_FLIGHT = 2
# Micro-batches a rank that are played; a pipeline is in its rhythm then.
_PLAYED = 2
# Bytes of a number that codes stand for, as for weights in 16 bits.
_NUMBER_BYTES = 2


@dataclass(frozen=True)
class Estimate:
    """What a way takes.

    Attributes:
        way: what was estimated.
        seconds: of a step, the optimizer's included.
        compute: of it, what operators take on the rank that has most, without recompute.
        recompute: what they take again.
        links: what they wait for collectives.
        bubble: what ranks wait for one another.
        update: what the optimizer takes.
        peak_bytes: of the rank that needs most.
        required_bytes: the same with recompute wherever it helps.
        fits: whether the peak is within the budget.
    """

    way: Way
    seconds: float
    compute: float
    recompute: float
    links: float
    bubble: float
    update: float
    peak_bytes: int
    required_bytes: int
    fits: bool


class Estimator:
    """Estimates ways of one model on one kind of hardware.

    Args:
        budget: bytes of a rank; None: any.
        held: bytes of the smallest micro-batch itself.
    """

    def __init__(
        self, sketch: Sketch, hardware: Hardware, budget: int | None, held: int = 0
    ) -> None:
        self.sketch, self.hardware, self.budget, self.held = sketch, hardware, budget, held
        self._schedule = cache(make_schedule)

    def __call__(self, way: Way) -> Estimate:
        """The estimate of a way.

        Raises:
            UsageError: its schedule has no such number of micro-batches.
        """
        stages = self.sketch.stages(way.stages, way.optimizer)
        schedule = self._played(way)
        flying = [schedule.in_flight(stage) if schedule else 1 for stage in range(len(stages))]
        ranks = [schedule.stages_of(r) for r in range(schedule.ranks)] if schedule else [(0,)]
        links = _Links(way, self.hardware)
        needs = [self._need([(stages[s], flying[s]) for s in mine], way) for mine in ranks]
        peaks = np.max(needs, axis=0)
        level = self._level(peaks)
        played = [_play(stage, level, way, links) for stage in stages]
        return self._timed(way, stages, schedule, ranks, played, level, links, peaks)

    def _played(self, way: Way) -> Schedule | None:
        if not way.schedule:
            return None
        count = min(way.microbatches, _PLAYED * way.pipeline)
        return self._schedule(way.schedule, way.pipeline, count, way.stages)

    def _level(self, peaks: Numbers) -> int:
        """The first level whose peak fits, or the one of the least peak."""
        fitting = np.flatnonzero(peaks <= (math.inf if self.budget is None else self.budget))
        return int(fitting[0]) if len(fitting) else int(peaks.argmin())

    def _need(self, mine: Sequence[tuple[StageSketch, int]], way: Way) -> Numbers:
        """Bytes of a rank, by level."""
        accumulates = way.microbatches > 1
        need = np.full(self.sketch.levels, float(self.held * way.microbatch))
        for stage, in_flight in mine:
            need += _static_bytes(stage, way, accumulates)
            need += in_flight * way.microbatch * (stage.saved + stage.sent)
        working = np.max([stage.working for stage, _ in mine], axis=0) * way.microbatch
        gathered = max(_gathered_bytes(stage, way) for stage, _ in mine)
        total: Numbers = need + working + gathered
        return total

    def _timed(
        self,
        way: Way,
        stages: Sequence[StageSketch],
        schedule: Schedule | None,
        ranks: Sequence[Sequence[int]],
        played: Sequence[StageTimes],
        level: int,
        links: _Links,
        peaks: Numbers,
    ) -> Estimate:
        count = way.microbatches
        pace = [sum(played[s].total for s in mine) for mine in ranks]
        slowest = int(np.argmax(pace))
        if schedule is None:
            step = count * pace[0]
        else:
            sends = [links.send(stage.sent * way.microbatch, stage.messages) for stage in stages]
            step = step_seconds(schedule, played, sends[:-1])
            step += (count - schedule.microbatches) * pace[slowest]
        mine = ranks[slowest]
        hidden = played[mine[0]].input_gradient + played[mine[0]].weight_gradient
        before = sum(links.before(stages[s]) for s in mine)
        around = before + max(sum(links.behind(stages[s]) for s in mine) - hidden, 0.0)
        compute = count * sum(stages[s].of(way.microbatch) for s in mine)
        recompute = count * sum(float(stages[s].seconds[level]) for s in mine) * way.microbatch
        waits = count * pace[slowest] - compute - recompute + around
        update = max(self._update(stages, mine, way) for mine in ranks)
        return Estimate(
            way=way,
            seconds=step + around + update,
            compute=compute,
            recompute=recompute,
            links=max(waits, 0.0),
            bubble=max(step - count * pace[slowest], 0.0),
            update=update,
            peak_bytes=int(peaks[level]),
            required_bytes=int(peaks.min()),
            fits=self.budget is None or bool(peaks[level] <= self.budget),
        )

    def _update(self, stages: Sequence[StageSketch], mine: Sequence[int], way: Way) -> float:
        """Seconds of the optimizer: weights and states are read and written, gradients read."""
        weights = [stages[s].weights for s in mine]
        moved = sum(2 * w.kept + w.gradient + 2 * w.state for w in weights)
        return moved / (way.shard if way.zero else 1) / self.hardware.bandwidth


class _Links:
    """Seconds of a way's collectives."""

    def __init__(self, way: Way, hardware: Hardware) -> None:
        sizes = way.mesh.sizes
        self.way = way
        self._shard = route(hardware, sizes, way.sharded_over) if way.zero else None
        copies = way.replicate > 1
        self._copies = route(hardware, sizes, way.replicated_over) if copies else None
        self._pipeline = route(hardware, sizes, "pp")
        weights, gradients = way.sends
        self._weights, self._gradients = _share_sent(weights), _share_sent(gradients)

    @property
    def gathers_each_time(self) -> bool:
        """Whether a micro-batch gathers weights, and not a step."""
        return self.way.zero == 3 or (self.way.zero > 0 and not self.way.schedule)

    @property
    def reduces_each_time(self) -> bool:
        """Whether a micro-batch reduces gradients, and not a step."""
        return self.way.zero in (2, 3) or self.way.microbatches == 1

    def gather(self, size: float) -> float:
        """Of weights."""
        return self._shard.gather(size * self._weights) if self._shard and size else 0.0

    def reduce(self, size: float) -> float:
        """Of gradients, over all that they are averaged over."""
        if not size:
            return 0.0
        part, seconds = size, 0.0
        if self._shard:
            seconds, part = self._shard.gather(size * self._gradients), size / self.way.shard
        return seconds + (self._copies.all_reduce(part) if self._copies else 0.0)

    def send(self, size: float, messages: int) -> float:
        """From a stage to the next."""
        return max(messages - 1, 0) * self._pipeline.send(0) + self._pipeline.send(size)

    def before(self, stage: StageSketch) -> float:
        """What a step gathers before its first micro-batch."""
        return 0.0 if self.gathers_each_time else self.gather(stage.weights.computed)

    def behind(self, stage: StageSketch) -> float:
        """What a step reduces behind its last micro-batch."""
        return 0.0 if self.reduces_each_time else self.reduce(stage.weights.gradient)


def _share_sent(kind: str | None) -> float:
    """Of the bytes of numbers, what travels."""
    return 1.0 if kind is None else wire_bytes(QUANTUM, kind) / QUANTUM / _NUMBER_BYTES


def _static_bytes(stage: StageSketch, way: Way, accumulates: bool) -> float:
    """Bytes of weights, gradients and states."""
    weights, shards = stage.weights, way.shard if way.zero else 1
    kept = weights.kept / shards + (weights.computed if way.zero in (1, 2) else 0.0)
    whole = way.zero in (0, 1)
    gradient = weights.gradient if whole else weights.gradient / shards
    if way.zero == 1 and not accumulates:  # reduced as they are made
        gradient = weights.gradient / shards
    return kept + gradient + weights.state / shards


def _gathered_bytes(stage: StageSketch, way: Way) -> float:
    """Bytes of weights and gradients that are whole for a while."""
    if way.zero == 0:
        return 0.0
    largest = stage.weights.largest * _IN_FLIGHT if way.zero == 3 else 0.0
    return largest + float(stage.reduced.max(initial=0.0))


def _play(stage: StageSketch, level: int, way: Way, links: _Links) -> StageTimes:
    """Forward and backward of a micro-batch, with what they wait for collectives."""
    size = way.microbatch
    again = float(stage.seconds[level])
    backward = stage.input_gradient + stage.weight_gradient
    share = backward / total if (total := float(backward.sum())) else backward
    forward = stage.forward * size - stage.forward_launches * (size - 1)
    backward = (backward + share * again) * size - stage.backward_launches * (size - 1)
    gathers = [links.gather(b) for b in stage.gathered] if links.gathers_each_time else []
    reduces = [links.reduce(b) for b in stage.reduced] if links.reduces_each_time else []
    ahead = _beside(forward, gathers or [0.0] * len(forward), [0.0] * len(forward))
    back = _beside(
        backward[::-1],
        gathers[::-1] if way.zero == 3 else [0.0] * len(backward),
        reduces[::-1] or [0.0] * len(backward),
    )
    late = min(float(stage.weight_gradient.sum()) * size, back)
    return StageTimes(ahead, back - late, late)


def _beside(compute: Numbers, gathers: Sequence[float], reduces: Sequence[float]) -> float:
    """Seconds of units one after the other, each behind its gather, and of their reductions."""
    if not any(gathers) and not any(reduces):
        return float(compute.sum())
    now = links = 0.0
    waiting, ends = deque(gather for gather in gathers if gather), deque[float]()
    for _ in range(min(_IN_FLIGHT, len(waiting))):
        links += waiting.popleft()
        ends.append(links)
    for seconds, gather, reduce in zip(compute.tolist(), gathers, reduces, strict=True):
        if gather:
            now = max(now, ends.popleft())
            if waiting:
                links = max(links, now) + waiting.popleft()
                ends.append(links)
        now += seconds
        if reduce:
            links = max(links, now) + reduce
    return max(now, links)
