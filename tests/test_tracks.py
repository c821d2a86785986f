"""The tracks of plans: thinned without losing a peak, in step with the values that are listed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxzero
from fxzero.plans import Plan, Track
from fxzero.tracks import MOST_INSTANTS, kept, of_each_rank, rounded, track

LISTS = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 9)), min_size=1, max_size=60)


@given(LISTS, st.integers(2, 20))
def test_the_highest_of_every_stretch_stays(steps: list[tuple[float, int]], most: int) -> None:
    seconds = [sum(step for step, _ in steps[:index]) for index in range(len(steps))]
    totals = [size for _, size in steps]
    found = kept(seconds, totals, most)
    assert found == sorted(set(found))
    assert len(found) <= most or len(totals) <= most
    assert totals.index(max(totals)) in found
    width = -(-len(totals) // max(most // 2, 1))
    for start in range(0, len(totals) - 2 * width):
        # Any two stretches in a row hold a whole one, whose highest stays.
        inside = totals[start : start + 2 * width]
        assert any(start <= index < start + 2 * width for index in found), inside


def test_few_instants_all_stay() -> None:
    assert kept([0.0, 0.0, 1.0], [3, 1, 2]) == [0, 1, 2]


def test_what_takes_no_time_is_seen_beside_what_takes_most_of_it() -> None:
    seconds = [index * 1e-6 for index in range(1000)] + [1.0 + index for index in range(1000)]
    found = kept(seconds, [1] * 2000)
    assert sum(index < 1000 for index in found) > 90
    assert sum(index >= 1000 for index in found) > 90


def test_a_role_that_never_changes_is_one_number() -> None:
    made = track(0, [0.0, 1 / 3], [{"parameter": 5, "saved": 1, "input": 0}, {"parameter": 5}])
    assert made == Track(0, (0.0, 0.3333333), {"parameter": (5,), "saved": (1, 0)})
    assert made.totals == (6, 5)
    assert made.of("parameter") == (5, 5)
    assert made.of("unknown") == (0, 0)


@given(st.lists(st.floats(0, 1e9), min_size=2))
def test_rounding_keeps_the_order(times: list[float]) -> None:
    times = sorted(times)
    assert sorted(map(rounded, times)) == list(map(rounded, times))


def test_ranks_of_large_pipelines_have_fewer_instants_each() -> None:
    assert of_each_rank(1) == MOST_INSTANTS
    assert of_each_rank(16) * 16 <= 4 * MOST_INSTANTS


@pytest.fixture(scope="module")
def planned() -> Plan:
    layers = [nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Flatten(0))
    inputs = torch.randn(64, 32)
    free = fxzero.plan(model, inputs)
    return fxzero.plan(model, inputs, memory_budget=(free.peak_bytes + free.minimum_budget) // 2)


def test_a_track_has_the_peak_and_ends_with_the_optimizers_step(planned: Plan) -> None:
    (found,) = planned.timeline
    phases = {phase.name: phase for phase in planned.phases}
    assert max(found.totals) == planned.peak_bytes
    assert found.totals[-1] == phases["optimizer step"].peak_bytes
    assert found.seconds[-1] == pytest.approx(planned.step_seconds)
    start = phases["backward"].start
    assert 0 < start < planned.step_seconds
    forward = [
        size for at, size in zip(found.seconds, found.totals, strict=True) if at < rounded(start)
    ]
    assert max(forward) <= phases["forward"].peak_bytes
    peak = found.totals.index(planned.peak_bytes)
    assert {r: found.of(r)[peak] for r in planned.peak.breakdown} == planned.peak.breakdown


def test_values_are_alive_where_the_track_has_their_bytes(planned: Plan) -> None:
    (found,) = planned.timeline
    peak = found.totals.index(planned.peak_bytes)
    assert all(value.first <= peak <= value.last for value in planned.peak.alive)
    for instant in range(len(found.seconds)):
        for values in (planned.peak.alive, planned.saved, planned.recomputed):
            held: dict[str, int] = {}
            for value in values:
                if value.first <= instant <= value.last:
                    held[value.role] = held.get(value.role, 0) + value.bytes
            assert all(size <= found.of(role)[instant] for role, size in held.items())
    backward = next(phase.start for phase in planned.phases if phase.name == "backward")
    assert planned.recomputed
    for value in planned.recomputed:
        assert found.seconds[value.first] >= rounded(backward)
    for value in planned.saved:
        assert found.seconds[value.first] < backward <= found.seconds[value.last]
