"""The monitor on several processes over gloo: all ranks decide alike, and say which rank it is."""

import re

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(pools):
    """What two ranks answer to a task."""
    return lambda task, **given: pools[2].run(f"monitor_cases:{task}", **given)


@pytest.mark.parametrize(("zero", "bad_rank"), [(0, 1), (3, 1), (3, 0)])
def test_a_loss_that_is_no_number_on_one_rank_stops_all(run, zero, bad_rank):
    first, second = run("not_a_number", zero=zero, bad_rank=bad_rank, step=6)
    message = f"not_finite: the loss of step 6 is nan, by rank {bad_rank}"
    text = f"AlarmError: [FXZ801] training was stopped by its monitor\n  {message}"
    # with zero=3 the next step's weights and losses are NaN on both; the first one counts
    assert first[0] == second[0]
    assert re.sub(r"by rank .*", f"by rank {bad_rank}", first[0]) == text
    assert first[1] == second[1] == 8
    assert len(first[2]) == 1
    assert not second[2]  # only the first rank has sinks


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_stale_rank_is_named(run, zero):
    (error, alarms), (other, nothing) = run("stale_rank", zero=zero, rank=1, step=4)
    assert (error, other, nothing) == ("no error", "no error", [])
    stale = [alarm for alarm in alarms if alarm[0] == "stale_rank"]
    assert stale[0] == (
        "stale_rank", 6, 3, "the weights of rank 1 have not changed by step 6, others' have"
    )  # fmt: skip
    differing = [alarm for alarm in alarms if alarm[0] == "weights_differ"]
    if zero == 0:  # otherwise no rank has another's weights
        more = "up.weight differs between rank 0 and rank 1, and 5 more"
        assert differing[0] == ("weights_differ", 6, 3, more)
    else:
        assert not differing


@pytest.mark.parametrize(
    ("ranks", "mesh", "name", "text"),
    [
        (2, {"dp": 2}, "down.bias", "down.bias differs between rank 0 and rank 1"),
        (
            4,
            {"dp_replicate": 2, "dp_shard": 2},
            "up.weight",
            "up.weight differs between rank 0 and rank 2",
        ),
    ],
)
def test_a_weight_that_differs_is_named_with_its_ranks(pools, ranks, mesh, name, text):
    changed = 1 if ranks == 2 else 2
    answers = pools[ranks].run("monitor_cases:changed_weight", mesh=mesh, rank=changed, name=name)
    assert {error for error, _ in answers} == {"no error"}
    assert answers[0][1][0] == ("weights_differ", 6, 3, text)
    assert {alarm[0] for alarm in answers[0][1]} == {"weights_differ"}


@pytest.mark.parametrize("zero", [0, 3])
def test_a_wrong_gradient_on_one_rank_is_an_alarm_of_all(run, zero):
    (error, alarms), _ = run("wrong_gradient", zero=zero, rank=1)
    assert error == "no error"
    ((kind, step, good, message),) = [a for a in alarms if a[0] == "wrong_gradient"]
    assert (kind, step, good) == ("wrong_gradient", 8, 4)
    assert re.match(
        r"the gradient of \S+ on rank \d differs from eager's by 0\.\d+ because of inn", message
    )


@pytest.mark.parametrize("zero", [0, 3])
def test_all_ranks_roll_back_together(run, zero, tmp_path):
    for error, steps, same in run("rolled_back", zero=zero, root=str(tmp_path)):
        assert (error, steps, same) == ("no error", 3, True)


@pytest.mark.parametrize("options", [{"zero": 0}, {"zero": 1, "microbatches": 2}, {"zero": 3}])
def test_monitored_training_is_bitwise_the_same(run, options):
    assert run("undisturbed", **options) == [True, True]


def test_records_are_of_all_ranks_together(run):
    (first, records), (second, nothing) = run("means", zero=3)
    assert not nothing
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert [loss for loss, _, _ in records] == pytest.approx(means, rel=1e-12)
    assert [round(samples, 6) for _, _, samples in records] == [32, 32]
    assert all(norm > 0 for _, norm, _ in records)


def test_ranks_with_different_monitors_are_told(run):
    first, second = run("different_settings")
    assert first == second
    assert first.startswith("DivergenceError: [FXZ601] ranks have different monitors")
    assert "rank 0: every=5" in first
    assert "rank 1: every=6" in first


def test_ranks_at_different_steps_are_told(run):
    first, second = run("different_steps")
    assert first == second
    assert first.startswith("DivergenceError: [FXZ601] ranks go on from different steps; no coll")


def test_a_sink_that_cannot_be_opened_is_an_error_of_all(run, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = run("sink_of_the_first", path=str(tmp_path / "file" / "run.jsonl"))
    assert first == second
    assert re.match(r"UsageError: \[FXZ101\] the sink JsonLines\(.*\) cannot be opened: ", first)


def test_a_model_that_torch_distributes(run):
    alarms, _ = run("of_torch")
    assert alarms == [
        ("weights_differ", "module.up.bias differs between rank 0 and rank 1"),
    ]


def test_a_pipeline_is_watched_and_its_shared_weights_are_compared(run):
    (loss, records, bubble), (other, nothing, _) = run("pipeline")
    assert loss == other == records[-1]["loss"]
    assert not nothing
    assert "no shadow check: no rank of a pipeline has the whole model" in records[0]["notes"]
    last = records[-1]
    assert last["planned_bubble"] == bubble > 0
    assert last["samples_per_second"] * last["step_seconds"] == pytest.approx(8)
    assert last["measured_peak_bytes"] is not None
    assert last["mfu"] > 0
    assert last["gradient_norm"] > 0
    assert not records[1]["alarms"]
    (alarm,) = last["alarms"]
    assert alarm["message"] == "first.weight differs between rank 0 and rank 1"
