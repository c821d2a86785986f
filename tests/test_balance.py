"""Balance: the cuts of a row into stages, against every way to cut it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxzero.errors import UsageError
from fxzero.pipelining.balance import Partition, Seconds, partition

NEVER = float("inf")


def evaluate(
    units: int, cuts: tuple[int, ...], microbatches: int, seconds: Seconds
) -> Partition | None:
    """A partition under 1F1B, None if it does not fit; adds up from the end as the program does."""
    slowest = total = 0.0
    bounds = (0, *cuts, units)
    stages = list(itertools.pairwise(bounds))
    for k, (start, stop) in enumerate(reversed(stages), start=1):
        time_of_stage = seconds(start, stop, min(microbatches, k))
        slowest, total = max(slowest, time_of_stage), time_of_stage + total
    return Partition(cuts, slowest, total) if slowest < NEVER else None


def every_partition(
    units: int, stages: int, microbatches: int, seconds: Seconds
) -> list[Partition]:
    """All that fit, best first."""
    ways = itertools.combinations(range(1, units), stages - 1)
    found = [evaluate(units, cuts, microbatches, seconds) for cuts in ways]
    return sorted(
        (p for p in found if p is not None),
        key=lambda p: (p.step_seconds(microbatches), p.slowest, p.cuts),
    )


def random_seconds(units: int, limit: float, seed: int) -> Seconds:
    """Seconds that do not add up: each cut sends bytes, and what does not fit is recomputed."""
    numbers = random.Random(seed)
    forward = [numbers.uniform(0.5, 1.5) for _ in range(units)]
    saved = [numbers.uniform(0.5, 1.5) for _ in range(units)]
    sent = [numbers.uniform(0.0, 1.0) for _ in range(units)]
    forward_before = [0.0, *itertools.accumulate(forward)]
    saved_before = [0.0, *itertools.accumulate(saved)]

    def seconds(start: int, stop: int, in_flight: int) -> float:
        forwards = forward_before[stop] - forward_before[start]
        bytes_saved = in_flight * (saved_before[stop] - saved_before[start])
        excess = max(bytes_saved - limit, 0.0) / bytes_saved
        if excess > 0.7:
            return NEVER
        return (3 + excess) * forwards + (sent[start] if start else 0.0)

    return seconds


def whole_seconds(units: int, seed: int) -> Seconds:
    """A few whole numbers, so that many partitions take equal times."""
    numbers = random.Random(seed)
    stages = itertools.combinations(range(units + 1), 2)
    table = {stage: float(numbers.randint(1, 3)) for stage in stages}
    return lambda start, stop, in_flight: table[start, stop] + in_flight // 2


def heavy_head(start: int, stop: int, in_flight: int) -> float:
    """24 layers of 1 + 2 seconds forward and backward, and a head of 5 times that."""
    return 3.0 * (stop - start) + (12.0 if stop == 25 else 0.0)


def test_equals_the_best_of_all_partitions() -> None:
    outcomes = Counter()
    for seed in range(150):
        numbers = random.Random(seed)
        units = numbers.randint(1, 9)
        stages = numbers.randint(1, min(units, 4))
        microbatches = numbers.randint(1, 6)
        seconds = random_seconds(units, numbers.uniform(0.5, 4.0), seed)
        expected = every_partition(units, stages, microbatches, seconds)
        for keep in (1, 2, 5, 100):
            assert partition(units, stages, microbatches, seconds, keep=keep) == expected[:keep]
        outcomes[bool(expected)] += 1
    assert outcomes[True] > 80
    assert outcomes[False] > 20


@pytest.mark.parametrize("keep", [1, 3, 8])
def test_ties_cost_no_time(keep: int) -> None:
    for seed in range(50):
        numbers = random.Random(seed)
        units, stages, microbatches = numbers.randint(4, 9), numbers.randint(2, 4), 3
        seconds = whole_seconds(units, seed)
        found = partition(units, stages, microbatches, seconds, keep=keep)
        expected = every_partition(units, stages, microbatches, seconds)
        assert found == [p for p in expected if p in found]
        times = [p.step_seconds(microbatches) for p in expected]
        assert [p.step_seconds(microbatches) for p in found] == times[:keep]


def test_of_equal_times_the_earlier_cuts_go_first() -> None:
    def seconds(start: int, stop: int, in_flight: int) -> float:
        return float(stop - start)

    found = partition(4, 3, 2, seconds, keep=3)
    assert [p.cuts for p in found] == [(1, 2), (1, 3), (2, 3)]
    assert partition(4, 3, 2, seconds) == found[:1]


def test_a_heavy_head_gets_few_layers() -> None:
    uniform = evaluate(25, (6, 12, 18), 16, heavy_head)
    assert uniform is not None
    assert uniform.step_seconds(16) == 582
    (best,) = partition(25, 4, 16, heavy_head)
    assert best == Partition(cuts=(5, 13, 21), slowest=24, total=87)
    assert best.step_seconds(16) == 447


def test_early_stages_get_fewer_layers_where_memory_is_short() -> None:
    def limited(start: int, stop: int, in_flight: int) -> float:
        saved = in_flight * (min(stop, 24) - start)
        return heavy_head(start, stop, in_flight) if saved <= 20 else NEVER

    (best,) = partition(25, 4, 16, limited)
    assert best == Partition(cuts=(5, 11, 20), slowest=27, total=87)


def test_a_larger_limit_is_never_slower() -> None:
    for seed in range(20):
        times = []
        for limit in (0.5, 1, 2, 4, 6, 8, 12, 20, 40):
            best = partition(20, 4, 8, random_seconds(20, limit, seed))
            times.append(best[0].step_seconds(8) if best else NEVER)
        assert times == sorted(times, reverse=True)
        assert times[0] == NEVER
        assert times[-1] < times[-4] < NEVER


def test_stages_hold_what_1f1b_has_in_flight() -> None:
    calls = Counter()

    def seconds(start: int, stop: int, in_flight: int) -> float:
        calls[start, stop, in_flight] += 1
        return float(stop - start)

    partition(8, 5, 3, seconds)
    assert {held for start, _, held in calls if start == 0} == {3}
    assert {held for _, stop, held in calls if stop == 7} == {2}
    assert {held for _, stop, held in calls if stop == 8} == {1}
    assert set(calls.values()) == {1}


def test_another_schedule_has_other_numbers_in_flight() -> None:
    asked = []

    def seconds(start: int, stop: int, in_flight: int) -> float:
        assert in_flight == 8
        return float(stop - start)

    def in_flight(k: int) -> int:
        asked.append(k)
        return 8

    (best,) = partition(8, 4, 8, seconds, in_flight=in_flight)
    assert best.cuts == (2, 4, 6)
    assert asked == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [NEVER, 100.0, 60.0])
def test_200_units_in_8_stages_take_less_than_2_seconds(limit: float) -> None:
    seconds = random_seconds(200, limit, seed=0)
    start = time.process_time()
    assert partition(200, 8, 32, seconds)
    assert time.process_time() - start < 2


@given(st.integers(1, 12), st.data())
def test_stages_are_contiguous_and_none_is_empty(units: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, units))
    microbatches = data.draw(st.integers(1, 8))
    limit, seed = data.draw(st.floats(0.5, 40)), data.draw(st.integers(0, 1000))
    seconds = random_seconds(units, limit, seed)
    found = partition(units, stages, microbatches, seconds, keep=4)
    assert len({p.cuts for p in found}) == len(found)
    for p in found:
        bounds = (0, *p.cuts, units)
        assert len(bounds) == stages + 1
        assert all(start < stop for start, stop in itertools.pairwise(bounds))
        assert p == evaluate(units, p.cuts, microbatches, seconds)


@pytest.mark.parametrize("stages", [0, 4])
def test_each_stage_needs_a_unit(stages: int) -> None:
    with pytest.raises(UsageError) as caught:
        partition(3, stages, 8, heavy_head)
    assert str(caught.value) == (
        f"[FXZ101] stages={stages} must be at least 1 and at most 3: "
        "each stage needs a unit of its own"
    )


def test_a_step_needs_a_micro_batch() -> None:
    with pytest.raises(UsageError, match="microbatches=0 must be at least 1"):
        partition(3, 2, 0, heavy_head)
