"""Schedules: every action once, no deadlock, and the bubbles and memory that theory promises."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from fxzero.errors import UsageError
from fxzero.pipelining.schedules import (
    NAMES,
    TWO_STAGES_A_RANK,
    Action,
    Kind,
    Schedule,
    StageTimes,
    make_schedule,
)
from fxzero.pipelining.simulation import Simulation, Span, peak_held, simulate

SPLIT = {"zb1p", "interleavedzb", "zbv", "dualpipev"}
V_SHAPED = {"zbv", "dualpipev"}


def action(text: str) -> Action:
    stage, microbatch = text[1:].split(".")
    return Action(Kind(text[0]), int(stage), int(microbatch))


def schedule(placement: tuple[int, ...], *orders: str) -> Schedule:
    """A schedule by hand, of orders such as "F0.0 F0.1"."""
    parsed = tuple(tuple(map(action, order.split())) for order in orders)
    microbatches = 1 + max(a.microbatch for order in parsed for a in order)
    return Schedule("by hand", placement, microbatches, parsed)


def equal_times(stages: int, ranks: int, forward: float, i: float, w: float) -> list[StageTimes]:
    """A rank's times for a micro-batch, shared by its stages."""
    share = ranks / stages
    return [StageTimes(forward * share, i * share, w * share)] * stages


def bubble(name: str, ranks: int, microbatches: int, stages: int | None = None) -> float:
    made = make_schedule(name, ranks, microbatches, stages)
    return simulate(made, equal_times(made.stages, ranks, 1, 1, 1)).bubble


def whole_rank_peaks(made: Schedule) -> list[float]:
    """What ranks hold: 1 for a micro-batch of a whole rank, half of it for weight gradients."""
    share = made.ranks / made.stages
    return list(peak_held(made, [share] * made.stages, [share / 2] * made.stages))


def in_order(made: Schedule, kinds: str) -> list[str]:
    """What the ranks do of some kinds."""
    return [" ".join(str(a) for a in order if a.kind in kinds) for order in made.orders]


# What the orders are.


@pytest.mark.parametrize(
    ("name", "ranks", "stages", "microbatches", "lines"),
    [
        ("gpipe", 2, 2, 2, ["F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1"]),
        ("1f1b", 1, 1, 3, ["F0.0 B0.0 F0.1 B0.1 F0.2 B0.2"]),
        ("1f1b", 2, 2, 3, ["F0.0 F0.1 B0.0 F0.2 B0.1 B0.2", "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"]),
        (
            "1f1b",
            3,
            3,
            4,
            [
                "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3",
                "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3",
                "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3",
            ],
        ),
        ("1f1b", 3, 3, 1, ["F0.0 B0.0", "F1.0 B1.0", "F2.0 B2.0"]),
        (
            "1f1b",
            2,
            3,
            3,
            [
                "F0.0 F1.0 F0.1 F1.1 B1.0 B0.0 F0.2 F1.2 B1.1 B0.1 B1.2 B0.2",
                "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2",
            ],
        ),
        (
            "zb1p",
            2,
            2,
            3,
            [
                "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
                "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2",
            ],
        ),
        (
            "interleaved1f1b",
            2,
            3,
            2,
            ["F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1"],
        ),
    ],
)
def test_small_schedules_are_these(
    name: str, ranks: int, stages: int, microbatches: int, lines: list[str]
) -> None:
    made = make_schedule(name, ranks, microbatches, stages)
    assert str(made).splitlines() == [f"rank {rank}: {line}" for rank, line in enumerate(lines)]
    assert made.splits_backward == (name in SPLIT)


def test_stages_are_placed_in_runs_in_loops_or_in_a_v() -> None:
    assert make_schedule("1f1b", 2, 1, 3).placement == (0, 0, 1)
    assert make_schedule("interleavedzb", 2, 1, 5).placement == (0, 1, 0, 1, 0)
    v = make_schedule("zbv", 3, 1)
    assert v.placement == (0, 1, 2, 2, 1, 0)
    assert (v.ranks, v.stages, v.stages_of(1)) == (3, 6, (1, 4))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 6), (3, 3), (4, 8), (4, 10)])
def test_interleaved_is_what_upstream_does(ranks: int, microbatches: int) -> None:
    made = make_schedule("interleaved1f1b", ranks, microbatches)
    for rank, order in enumerate(made.orders):
        upstream = object.__new__(ScheduleInterleaved1F1B)
        upstream.pp_group_size, upstream.rank, upstream.n_local_stages = ranks, rank, 2
        upstream._n_microbatches = microbatches
        upstream.microbatches_per_round = microbatches // (microbatches // ranks)
        theirs = upstream._calculate_single_rank_operations(rank)
        assert [str(a) for a in order] == [
            f"{a.computation_type.value}{a.stage_index}.{a.microbatch_index}" for a in theirs if a
        ]


def test_dualpipev_is_zbv_with_one_more_in_flight_and_joined_backwards() -> None:
    zbv, dual = make_schedule("zbv", 4, 12), make_schedule("dualpipev", 4, 12)
    assert in_order(zbv, "F") == in_order(dual, "F")
    joined = [order.replace("B", "I") for order in in_order(dual, "IB")]
    assert joined == in_order(zbv, "I")
    assert all(a.kind is not Kind.BACKWARD for order in zbv.orders for a in order)
    counts = Counter(a.kind for order in dual.orders for a in order)
    assert counts[Kind.BACKWARD] > 0
    assert counts[Kind.INPUT_GRADIENT] == counts[Kind.WEIGHT_GRADIENT] > 0


# What they cost.


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
def test_bubble_of_gpipe_and_1f1b_is_exact(ranks: int, microbatches: int) -> None:
    expected = (ranks - 1) / (microbatches + ranks - 1)
    assert bubble("gpipe", ranks, microbatches) == pytest.approx(expected)
    assert bubble("1f1b", ranks, microbatches) == pytest.approx(expected)


@pytest.mark.parametrize("loops", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_bubble_of_interleaved_is_exact(ranks: int, rounds: int, loops: int) -> None:
    expected = (ranks - 1) / (ranks - 1 + loops * rounds * ranks)
    made = bubble("interleaved1f1b", ranks, rounds * ranks, loops * ranks)
    assert made == pytest.approx(expected)


@pytest.mark.parametrize("name", ["interleavedzb", "zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_no_bubble_but_until_the_last_rank_starts(name: str, ranks: int) -> None:
    microbatches = 2 * ranks
    expected = (ranks - 1) / (6 * microbatches + ranks - 1)
    assert bubble(name, ranks, microbatches) == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 4), (4, 9)])
def test_weight_gradients_shrink_the_bubble_of_1f1b_to_a_third(
    ranks: int, microbatches: int
) -> None:
    expected = (ranks - 1) / (3 * microbatches + ranks - 1)
    assert bubble("zb1p", ranks, microbatches) == pytest.approx(expected)


# From the event simulation of upstream's own orders (shared notes on pipelines, table 1.6).
TABLE = {
    (4, 8): {
        "gpipe": (0.273, 0.290),
        "1f1b": (0.273, 0.290),
        "interleaved1f1b": (0.158, 0.178),
        "interleavedzb": (0.059, 0.108),
        "zbv": (0.059, 0.093),
        "dualpipev": (0.059, 0.104),
    },
    (8, 32): {
        "gpipe": (0.179, 0.203),
        "1f1b": (0.179, 0.203),
        "interleaved1f1b": (0.099, 0.111),
        "interleavedzb": (0.035, 0.065),
        "zbv": (0.035, 0.057),
        "dualpipev": (0.035, 0.070),
    },
}


@pytest.mark.parametrize(("ranks", "microbatches"), TABLE)
@pytest.mark.parametrize("name", TABLE[4, 8])
def test_bubbles_are_no_larger_than_upstream(name: str, ranks: int, microbatches: int) -> None:
    stages = make_schedule(name, ranks, microbatches).stages
    cases = [((1, 1, 1), 0.0), ((1, 1.2, 0.8), 0.05)]
    for (seconds, link), theirs in zip(cases, TABLE[ranks, microbatches][name], strict=True):
        times = equal_times(stages, ranks, *seconds)
        ours = simulate(make_schedule(name, ranks, microbatches, times=times), times, link)
        assert ours.bubble <= theirs + 0.005


@pytest.mark.parametrize(("ranks", "microbatches"), TABLE)
def test_ranks_hold_no_more_than_upstream(ranks: int, microbatches: int) -> None:
    def peaks(name: str) -> list[float]:
        return whole_rank_peaks(make_schedule(name, ranks, microbatches))

    each = range(ranks)
    assert peaks("gpipe") == [microbatches] * ranks
    assert peaks("1f1b") == [ranks - rank for rank in each]
    assert peaks("zb1p") == [ranks - rank / 2 for rank in each]
    assert peaks("interleaved1f1b") == [1.5 * ranks - 0.5 - rank for rank in each]
    assert peaks("interleavedzb") == [ranks - rank / 4 for rank in each]
    assert peaks("zbv") == [ranks] * ranks
    assert peaks("dualpipev") == [ranks + 0.5] * ranks


@pytest.mark.parametrize("name", ["1f1b", "zb1p"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (3, 2), (4, 4), (4, 9)])
def test_in_flight_is_the_distance_to_the_end(name: str, stages: int, microbatches: int) -> None:
    made = make_schedule(name, stages, microbatches)
    for stage in range(stages):
        assert made.in_flight(stage) == min(microbatches, stages - stage)


def test_in_flight_is_counted_by_stage() -> None:
    made = schedule((0, 0), "F0.0 F1.0 F0.1 I1.0 I0.0 F1.1 B1.1 B0.1 W1.0 W0.0")
    assert (made.in_flight(0), made.in_flight(1)) == (2, 1)


def test_weight_gradients_are_placed_by_the_times_of_stages() -> None:
    slow_end = [StageTimes(1, 1, 1)] * 3 + [StageTimes(3, 3, 3)]
    planned = make_schedule("zbv", 2, 6, times=slow_end)
    assert planned != make_schedule("zbv", 2, 6)
    by_default = simulate(make_schedule("zbv", 2, 6), slow_end).step_seconds
    assert simulate(planned, slow_end).step_seconds <= by_default


# Any schedule.


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, int, int, list[StageTimes], list[float]]:
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(1, 6))
    stages = 2 * ranks if name in V_SHAPED else draw(st.integers(ranks, 3 * ranks))
    microbatches = draw(st.integers(1, 12))
    seconds = st.sampled_from([0.0, 0.5, 1.0, 1.2, 3.0])
    times = draw(st.lists(st.builds(StageTimes, *[seconds] * 3), min_size=stages, max_size=stages))
    link = draw(st.lists(seconds, min_size=stages - 1, max_size=stages - 1))
    return name, ranks, stages, microbatches, times, link


@given(cases())
@settings(max_examples=60)
def test_every_action_runs_once_and_after_what_it_needs(
    case: tuple[str, int, int, int, list[StageTimes], list[float]],
) -> None:
    name, ranks, stages, microbatches, times, link = case
    made = make_schedule(name, ranks, microbatches, stages, times)
    assert made == make_schedule(name, ranks, microbatches, stages, times)
    assert (made.ranks, made.stages, made.microbatches) == (ranks, stages, microbatches)
    assert made.splits_backward <= (name in SPLIT)
    check_is_complete(made)
    played = simulate(made, times, link)
    assert played == simulate(made, times, link)
    check_times_fit(made, times, link, played)


def check_is_complete(made: Schedule) -> None:
    """Each stage takes its micro-batches in order, on its rank, and once."""
    assert set(made.placement) == set(range(made.ranks))
    turns: dict[tuple[int, str], list[int]] = {}
    for rank, order in enumerate(made.orders):
        for a in order:
            assert made.placement[a.stage] == rank
            parts = "IW" if a.kind is Kind.BACKWARD else a.kind.value
            for part in parts:
                turns.setdefault((a.stage, part), []).append(a.microbatch)
    assert set(turns) == {(stage, part) for stage in range(made.stages) for part in "FIW"}
    assert all(turn == list(range(made.microbatches)) for turn in turns.values())


def check_times_fit(
    made: Schedule, times: list[StageTimes], link: list[float], played: Simulation
) -> None:
    """By books kept here: no rank does two things at once, and none too early."""
    spans = {}
    for span in played.spans:
        a, seconds = span.action, times[span.action.stage]
        for part in "IW" if a.kind is Kind.BACKWARD else a.kind.value:
            spans[part, a.stage, a.microbatch] = span
        wanted = {"F": seconds.forward, "I": seconds.input_gradient, "W": seconds.weight_gradient}
        wanted["B"] = wanted["I"] + wanted["W"]
        assert span.end == span.start + wanted[a.kind]
    for (part, stage, microbatch), span in spans.items():
        needs = {
            "F": [("F", stage - 1)],
            "I": [("F", stage), ("I", stage + 1)],
            "W": [("I", stage)],
        }
        for need, other in needs[part]:
            if not 0 <= other < made.stages:
                continue
            before = spans[need, other, microbatch]
            if before is span:
                continue
            far = made.placement[stage] != made.placement[other]
            arrival = before.end + (link[min(stage, other)] if far else 0.0)
            assert span.start >= arrival
    for rank, order in enumerate(made.orders):
        row = [span for span in played.spans if span.rank == rank]
        assert Counter(span.action for span in row) == Counter(order)
        assert all(a.end <= b.start for a, b in pairwise(row))
        assert played.busy[rank] == pytest.approx(sum(span.end - span.start for span in row))
    assert played.step_seconds == max(span.end for span in played.spans)
    assert 0 <= played.bubble <= 1 or played.bubble == pytest.approx(0)


@given(cases())
@settings(max_examples=60)
def test_no_rank_holds_more_than_the_first_one_may(
    case: tuple[str, int, int, int, list[StageTimes], list[float]],
) -> None:
    name, ranks, stages, microbatches, times, _ = case
    made = make_schedule(name, ranks, microbatches, stages, times)
    held = peak_held(made, [1.0] * stages, [1.0] * stages)
    for rank in range(ranks):
        run = len(made.stages_of(rank))
        assert held[rank] <= microbatches * run
        if name == "zb1p":
            assert held[rank] <= ranks * run
        elif name in V_SHAPED:
            assert held[rank] <= 2 * ranks + (name == "dualpipev")


# The simulator.

UNIT = StageTimes(1.0, 1.0, 1.0)


def spans_of(played: Simulation) -> list[tuple[str, float, float]]:
    return [(str(span.action), span.start, span.end) for span in played.spans]


def test_a_stage_waits_for_what_it_receives() -> None:
    made = schedule((0, 1), "F0.0 F0.1 B0.0 B0.1", "F1.0 B1.0 F1.1 I1.1 W1.1")
    times = [StageTimes(1.0, 2.0, 3.0), StageTimes(2.0, 1.0, 1.0)]
    played = simulate(made, times, 0.5)
    assert spans_of(played) == [
        ("F0.0", 0.0, 1.0),
        ("F0.1", 1.0, 2.0),
        ("F1.0", 1.5, 3.5),
        ("B1.0", 3.5, 5.5),
        ("F1.1", 5.5, 7.5),
        ("B0.0", 6.0, 11.0),
        ("I1.1", 7.5, 8.5),
        ("W1.1", 8.5, 9.5),
        ("B0.1", 11.0, 16.0),
    ]
    assert played.spans[0] == Span(0, action("F0.0"), 0.0, 1.0)
    assert (played.step_seconds, played.busy) == (16.0, (12.0, 8.0))
    assert played.bubble == 1 - 20 / 32


def test_transfers_are_by_boundary_and_cost_nothing_on_one_rank() -> None:
    made = schedule((0, 0, 1), "F0.0 F1.0 B1.0 B0.0", "F2.0 B2.0")
    assert simulate(made, [UNIT] * 3, [100.0, 0.25]).step_seconds == 9.5
    assert simulate(made, [UNIT] * 3, 0.25).step_seconds == 9.5
    assert simulate(made, [UNIT] * 3).bubble == pytest.approx(1 / 2)


def test_a_step_that_takes_no_time_has_no_bubble() -> None:
    made = make_schedule("zbv", 2, 3)
    assert simulate(made, [StageTimes(0.0, 0.0, 0.0)] * 4).bubble == 0.0


def test_what_ranks_hold_is_read_off_their_orders() -> None:
    made = schedule((0, 1), "F0.0 F0.1 I0.0 I0.1 W0.0 W0.1", "F1.0 I1.0 F1.1 W1.0 B1.1")
    assert peak_held(made, [10.0, 8.0], [4.0, 3.0]) == (20.0, 11.0)
    assert peak_held(made, [1.0, 8.0], [4.0, 10.0]) == (8.0, 18.0)


def test_a_deadlock_names_who_waits_for_what() -> None:
    made = schedule((0, 1), "F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1")
    with pytest.raises(UsageError) as error:
        simulate(made, [UNIT] * 2)
    assert str(error.value).splitlines() == [
        "[FXZ101] schedule 'by hand' deadlocks after 2 of 8 actions: an action must come after all"
        " that it needs",
        "  rank 0 waits for ever with B0.0, which needs I1.0 of rank 1",
        "  rank 1 waits for ever with F1.1, which needs F0.1 of rank 0",
    ]


def test_an_action_before_its_own_forward_is_a_deadlock() -> None:
    with pytest.raises(UsageError, match=r"rank 0 waits for ever with B0\.0, which needs F0\.0"):
        simulate(schedule((0,), "B0.0 F0.0"), [UNIT])


# What cannot be.


def message(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        make_schedule(*arguments, **options)
    return str(error.value).removeprefix("[FXZ101] ")


def test_an_unknown_schedule_is_named_with_the_nearest() -> None:
    text = message("1f2b", 2, 2)
    assert text.startswith("schedule: unknown option '1f2b'; did you mean '1f1b'?\n  known: 1f1b,")


def test_numbers_that_do_not_fit_say_what_would() -> None:
    assert message("1f1b", 0, 2) == "ranks=0: a pipeline needs 1 at least"
    assert message("zbv", 2, 0) == "microbatches=0: a pipeline needs 1 at least"
    assert message("gpipe", 4, 2, 3) == (
        "3 stages leave some of 4 ranks without work\n"
        "  cut the model into 4 stages or more, or use 3 ranks"
    )
    assert message("dualpipev", 2, 2, 5) == (
        "schedule 'dualpipev' has two stages a rank: 4 on 2 ranks, not 5\n"
        "  cut the model into 4 stages, or use one of gpipe, 1f1b, zb1p, interleaved1f1b, "
        "interleavedzb"
    )
    assert message("1f1b", 2, 2, times=[UNIT]) == (
        "times of 1 stages for a pipeline of 2: give one each"
    )


def test_the_simulator_wants_times_and_transfers_of_all_stages() -> None:
    made = make_schedule("1f1b", 3, 2)
    with pytest.raises(UsageError, match="times of 2 stages for a pipeline of 3"):
        simulate(made, [UNIT] * 2)
    with pytest.raises(UsageError, match="transfer_seconds of 3 boundaries: 3 stages have 2"):
        simulate(made, [UNIT] * 3, [0.1] * 3)


def test_the_default_number_of_stages_is_one_or_two_a_rank() -> None:
    for name in NAMES:
        assert make_schedule(name, 3, 1).stages == (6 if name in TWO_STAGES_A_RANK else 3)
