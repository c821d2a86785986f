"""The monitor on one process: what it reports, what it sees, what it does, and what it leaves."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import sabotage
import torch
from monitor_cases import (
    Net,
    alarms_of,
    batch,
    build,
    nan_at,
    one_step,
    plain,
    quiet,
    sabotaged,
    train,
)
from torch import nn

import fxzero
from fxzero import AlarmError, AlarmWarning, CheckpointError, UsageError
from fxzero.monitor import (
    JsonLines,
    Monitor,
    Prometheus,
    Record,
    Thresholds,
)
from fxzero.randomness import RandomState


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def watched(steps: int, model: Any = None, optimizer: Any = None, **options: Any) -> list[Record]:
    """The records of some steps; alarms warn nobody unless they are asked to."""
    records: list[Record] = []
    if model is None:
        model, optimizer = plain()
    given = {name: options.pop(name) for name in ("before", "scale") if name in options}
    monitor = Monitor(model, optimizer=optimizer, sinks=[records.append], **options)
    train(model, optimizer, steps, monitor, **given)
    return records


# What it reports


def test_a_record_is_made_behind_the_first_step_and_every_n() -> None:
    records = watched(20, every=8)
    assert [(r.step, r.steps) for r in records] == [(1, 1), (8, 7), (16, 8)]
    assert all(r.step_seconds > r.loading_seconds >= 0 for r in records)
    assert all(r.samples_per_second > 0 and r.tokens_per_second is None for r in records)


def test_losses_and_norms_are_those_of_the_steps() -> None:
    model, optimizer = plain()
    losses, norms = [], []
    for number in range(1, 9):
        loss = model(batch(number))
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        norms.append(nn.utils.get_total_norm(gradients).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    first, second = watched(8, every=8)
    assert (first.loss, first.gradient_norm) == (losses[0], norms[0])
    assert (second.loss, second.gradient_norm) == (losses[-1], norms[-1])
    assert second.mean_loss == pytest.approx(sum(losses[1:]) / 7, rel=1e-12)


def test_the_measured_peak_is_the_planned_one() -> None:
    records = watched(8, *build(), every=4)
    assert records[0].measured_peak_bytes is None  # the first step is traced
    for record in records[1:]:
        assert record.measured_peak_bytes is not None
        assert record.planned_peak_bytes is not None
        # the random state of dropout lies on the host, and is counted on a CPU
        assert record.measured_peak_bytes == pytest.approx(record.planned_peak_bytes, rel=0.05)


def test_figures_of_the_plan_and_of_the_hardware() -> None:
    model, optimizer = build(memory_budget=None, recompute="full")
    records = watched(4, model, optimizer, every=4, hardware="l4")
    plan = model.plan
    assert records[1].planned_recompute_seconds == plan.recompute_seconds > 0
    assert records[1].planned_step_seconds == plan.step_seconds
    assert records[1].planned_bubble is None
    # three products of 16 x 8 x 32, each with two in the backward; the input needs no gradient
    flops = 2 * 16 * 8 * 32 * (3 + 3 + 1)
    assert records[1].mfu == pytest.approx(flops / records[1].step_seconds / 30.3e12, rel=0.5)


def test_tokens_are_counted_of_integer_inputs() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids).square().mean()

    model = Tokens()  # not compiled: there is less to say
    records: list[Record] = []
    monitor = Monitor(model, every=2, sinks=[records.append])
    for _ in range(2):
        with monitor.step(ids := torch.randint(50, (4, 16))) as step:
            loss = model(ids)
            loss.backward()
            step.loss(loss)
    record = records[-1]
    assert record.tokens_per_second == pytest.approx(16 * record.samples_per_second)
    assert record.gradient_norm is not None
    assert record.planned_peak_bytes is None
    assert record.mfu is None
    assert "no shadow check: the model is not compiled" in records[0].notes


def test_what_is_not_known_is_said() -> None:
    records: list[Record] = []
    model, optimizer = plain()
    monitor = Monitor(model, every=2, sinks=[records.append])  # without the optimizer
    train(model, optimizer, 2, monitor)
    assert records[0].gradient_norm is None
    assert any("no parameter has a gradient when the step ends" in n for n in records[0].notes)
    assert any("the peak of this device is not known" in n for n in records[0].notes)


def test_a_norm_that_the_loop_has_is_taken() -> None:
    records: list[Record] = []
    model, optimizer = plain()
    monitor = Monitor(model, every=2, optimizer=optimizer, sinks=[records.append])
    for number in range(1, 3):
        with monitor.step(batch(number)) as step:
            step.loss(loss := model(batch(number)))
            loss.backward()
            norm = fxzero.clip_grad_norm_(model, 1e-3)
            step.gradient_norm(norm)
            optimizer.step()
            optimizer.zero_grad()
    assert records[-1].gradient_norm == norm.item() > 1e-3


def test_a_training_that_goes_on_counts_from_its_checkpoint() -> None:
    records: list[Record] = []
    model, optimizer = build()
    monitor = Monitor(model, every=10, optimizer=optimizer, sinks=[records.append])
    monitor.steps = 105
    train(model, optimizer, 15, monitor)
    assert [(r.step, r.steps) for r in records] == [(106, 1), (110, 4), (120, 10)]
    assert records[0].measured_peak_bytes is None  # it is traced there
    assert monitor.steps == 120
    monitor.steps = 3
    train(model, optimizer, 7, monitor)
    assert (records[-1].step, records[-1].steps) == (10, 7)


# What it leaves


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"memory_budget": "20KiB"}, {"microbatches": 2}])
def test_monitored_training_is_bitwise_the_same(options: dict[str, Any]) -> None:
    model, optimizer = build(**options)
    losses = train(model, optimizer, 12)
    stream = torch.rand(4)
    again, optimizer = build(**options)
    monitor = Monitor(again, every=3, optimizer=optimizer, shadow_every=4)
    assert all(map(torch.equal, train(again, optimizer, 12, monitor), losses))
    assert torch.equal(torch.rand(4), stream)
    assert all(map(torch.equal, weights(again), weights(model)))
    assert again.plan.hash == model.plan.hash


def test_a_shadow_check_leaves_gradients_and_plans_as_they_were() -> None:
    model, optimizer = build()
    monitor = Monitor(model, every=2, optimizer=optimizer, shadow_every=2)
    for number in range(1, 5):
        with monitor.step(batch(number)) as step:
            step.loss(model.step(batch(number)))
            kept = [p.grad for p in model.parameters()]
            state = RandomState.now()
        assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
        assert torch.equal(RandomState.now().cpu, state.cpu)


def test_a_shadow_check_of_micro_batches_runs_the_graphs_that_train() -> None:
    model, optimizer = build(microbatches=2)
    train(model, optimizer, 4)
    known = list(model._fxzero.steps)
    train(model, optimizer, 4, Monitor(model, every=2, optimizer=optimizer, shadow_every=2))
    assert list(model._fxzero.steps) == known


# What it sees


def test_a_planted_wrong_gradient_is_caught_within_n_steps() -> None:
    model, optimizer = build()

    def wrong(results: list[Any]) -> list[Any]:
        return [results[0] * 1.01, *results[1:]]

    def before(number: int) -> None:
        if number == 5:
            sabotaged(model, wrong)

    records = watched(12, model, optimizer, every=4, shadow_every=4, before=before, actions=quiet())
    assert not alarms_of(records[:2])  # behind step 4 all was right
    alarm = alarms_of(records)[0]
    name = next(iter(dict(model.named_parameters())))
    assert (alarm.kind, alarm.step, alarm.last_good) == ("wrong_gradient", 8, 4)
    assert alarm.observed == pytest.approx(0.01, rel=0.05)
    assert alarm.message.startswith(f"the gradient of {name} differs from eager's by 0.01")
    assert alarm.message.endswith("tolerance 0.0001; model.verify(*inputs) says more")


def test_a_sabotaged_pass_is_named() -> None:
    model, optimizer = build()
    sabotage.plant(model, "deduplicate", sabotage.scale_gradient("up.bias", 1.5))
    records = watched(4, model, optimizer, every=4, shadow_every=4, actions=quiet())
    (alarm,) = alarms_of(records)
    assert (alarm.kind, alarm.step) == ("wrong_gradient", 4)
    assert re.match(
        r"the gradient of up\.bias differs from eager's by 0\.5 because of pass deduplicate, tol",
        alarm.message,
    )


def test_a_wrong_gradient_of_a_tied_weight_is_caught() -> None:
    model, optimizer = build(tied=True)

    def wrong(results: list[Any]) -> list[Any]:
        return [None if r is None else r if i else r / 2 for i, r in enumerate(results)]

    def before(number: int) -> None:
        if number == 2:
            sabotaged(model, wrong)

    records = watched(3, model, optimizer, every=9, shadow_every=3, before=before, actions=quiet())
    alarm = alarms_of(records)[0]
    assert (alarm.kind, alarm.step) == ("wrong_gradient", 3)
    assert "the gradient of up.weight differs" in alarm.message


def test_a_broken_tie_is_named() -> None:
    model, optimizer = build(tied=True)

    def before(number: int) -> None:
        if number == 3:
            model.twin.weight = nn.Parameter(model.up.weight.detach().clone())

    records = watched(4, model, optimizer, every=2, before=before, actions=quiet())
    assert [(a.kind, a.step, a.last_good) for a in alarms_of(records)] == [("broken_tie", 4, 2)]
    assert alarms_of(records)[0].message == (
        "twin.weight was one tensor with up.weight and is another"
    )


def test_a_loss_that_is_no_number_names_its_step() -> None:
    with pytest.raises(AlarmError) as caught:
        watched(20, every=10, actions={"not_finite": "stop"}, scale=lambda n: nan_at(n, 14))
    assert str(caught.value) == (
        "[FXZ801] training was stopped by its monitor\n  not_finite: the loss of step 14 is nan"
    )


def test_a_spike_warns_by_default() -> None:
    def scale(number: int) -> torch.Tensor:
        return torch.tensor(20.0 if number == 47 else 1.0)

    with pytest.warns(AlarmWarning, match=r"^loss_spike: the loss of step 47 is .*: z-score \d+"):
        records = watched(50, scale=scale, shadow_every=0)
    (alarm,) = [a for a in alarms_of(records) if a.kind == "loss_spike"]
    assert (alarm.step, alarm.last_good, alarm.done) == (47, 45, ("warn",))


def test_a_peak_beyond_the_plan_is_seen() -> None:
    model, optimizer = build()
    held: list[torch.Tensor] = []
    records: list[Record] = []
    monitor = Monitor(model, every=1, optimizer=optimizer, sinks=[records.append], actions=quiet())
    for number in range(1, 15):
        with monitor.step(batch(number)) as step:
            if number > 2:  # on a CPU one step in ten is measured: the second and the twelfth
                held.append(torch.ones(10_000))
            step.loss(one_step(model, optimizer, (batch(number),)))
    (alarm,) = alarms_of(records)
    assert (alarm.kind, alarm.step, alarm.threshold) == ("peak", 12, 1.1)
    assert alarm.observed > 1.5
    assert "times the planned peak, threshold 1.1" in alarm.message


# What it does


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's states, in the order of its parameters and of their names."""
    by_parameter = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [state[name].clone() for state in by_parameter for name in sorted(state)]


def test_a_rollback_restores_bitwise_what_was_before(tmp_path: Path) -> None:
    model, optimizer = plain()
    monitor = Monitor(
        model,
        every=4,
        optimizer=optimizer,
        checkpoints=tmp_path,
        actions=quiet(not_finite="rollback"),
    )
    kept: dict[int, Any] = {}
    for number in range(1, 9):
        if number > 1:
            fxzero.checkpoint.save(
                tmp_path, model, optimizer, step=number - 1, extra={"lr": number}
            )
            kept[number - 1] = weights(model), states(optimizer), RandomState.now().cpu
        with monitor.step(*(inputs := (batch(number), nan_at(number, 7)))) as step:
            step.loss(one_step(model, optimizer, inputs))
    # the loss of step 6 was the last good one: it is that of the weights behind step 5
    assert step.loaded is not None
    assert (step.loaded.step, step.loaded.extra, monitor.steps) == (5, {"lr": 6}, 5)
    expected, state, stream = kept[5]
    assert all(map(torch.equal, weights(model), expected))
    assert all(map(torch.equal, states(optimizer), state))
    assert torch.equal(RandomState.now().cpu, stream)
    assert all(p.grad is None for p in model.parameters())
    assert fxzero.checkpoint.latest(tmp_path) == tmp_path / "step-5"
    # and from there on it is what a loaded checkpoint would do
    again, other = plain()
    fxzero.checkpoint.load(tmp_path / "step-5", again, other)
    ours = [one_step(model, optimizer, (batch(n), nan_at(0, 1))) for n in (6, 7)]
    fxzero.checkpoint.load(tmp_path / "step-5", again, other)
    theirs = [one_step(again, other, (batch(n), nan_at(0, 1))) for n in (6, 7)]
    assert all(map(torch.equal, ours, theirs))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = plain()
    for step in (1, 2):
        fxzero.checkpoint.save(tmp_path, model, optimizer, step=step)
    (file,) = (tmp_path / "step-2").glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monitor = Monitor(
        model,
        every=5,
        optimizer=optimizer,
        checkpoints=tmp_path,
        actions=quiet(not_finite="rollback"),
    )
    train(model, optimizer, 5, monitor, scale=lambda n: nan_at(n, 5))
    assert monitor.steps == 1


def test_a_rollback_to_nothing_is_an_error_and_in_the_record(tmp_path: Path) -> None:
    records: list[Record] = []
    model, optimizer = plain()
    monitor = Monitor(
        model,
        every=5,
        optimizer=optimizer,
        sinks=[records.append],
        checkpoints=tmp_path,
        actions={"not_finite": "rollback"},
    )
    fxzero.checkpoint.save(tmp_path, model, optimizer, step=4)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .* up to step 3 to roll"):
        train(model, optimizer, 5, monitor, scale=lambda n: nan_at(n, 5))
    assert [(a.kind, a.done) for a in alarms_of(records)] == [("not_finite", ())]


def test_what_goes_wrong_again_and_again_ends(tmp_path: Path) -> None:
    model, optimizer = plain()
    fxzero.checkpoint.save(tmp_path, model, optimizer, step=0)
    monitor = Monitor(
        model,
        every=3,
        optimizer=optimizer,
        checkpoints=tmp_path,
        actions=quiet(not_finite="rollback"),
    )
    with pytest.raises(AlarmError, match=r"step-0 was rolled back to 2 times, and again: not_fin"):
        train(model, optimizer, 12, monitor, scale=lambda n: nan_at(n, 3))


def test_an_alarms_checkpoint_is_none_to_go_on_from(tmp_path: Path) -> None:
    model, optimizer = plain()
    options = {"checkpoints": tmp_path, "actions": {"not_finite": ("stop", "checkpoint")}}
    monitor = Monitor(model, every=5, optimizer=optimizer, **options)
    with pytest.raises(AlarmError):
        train(model, optimizer, 5, monitor, scale=lambda n: nan_at(n, 5))
    assert fxzero.checkpoint.latest(tmp_path) is None
    loaded = fxzero.checkpoint.load(tmp_path / "alarms", model, optimizer)
    assert loaded.step == 5
    assert loaded.extra == {"alarms": ["not_finite: the loss of step 5 is nan"]}


# What is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, "every=0 must be a number of steps, at least 1 and at most 10000"),
        ({"every": 10**9}, "every=1000000000 must be a number of steps, at least 1 and"),
        ({"every": True}, "every=True must be a number of steps, at least 1"),
        ({"shadow_every": -1}, "shadow_every=-1 must be a number of steps, at least 0"),
        ({"actions": {"los_spike": "warn"}}, "unknown option 'los_spike'; did you mean 'loss_s"),
        ({"actions": {"loss_spike": "halt"}}, "the action of loss_spike: unknown option 'halt'"),
        ({"actions": {"loss_spike": "rollback"}}, "the action 'rollback' needs checkpoints= of"),
        (
            {"actions": {"peak": "checkpoint"}, "checkpoints": "x"},
            "the action 'checkpoint' needs optimizer= of the Monitor",
        ),
        ({"sinks": ["run.jsonl"]}, "a sink must take records, and 'run.jsonl' does not"),
        ({"sinks": [JsonLines]}, "a sink must take records, and <class"),
        ({"hardware": "h100"}, "no hardware 'h100'; did you mean"),
        ({"inputs": "missing.json"}, "cannot read missing.json: No such file or directory"),
    ],
)
def test_settings_that_cannot_be_right(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Monitor(fxzero.compile(Net(), inner="eager"), **options)
    assert text in str(caught.value)


def test_settings_that_cannot_be_right_for_a_plain_model() -> None:
    with pytest.raises(UsageError, match=r"shadow_every=5 cannot be: the model is not compiled"):
        Monitor(Net(), shadow_every=5)
    with pytest.raises(UsageError, match=r"the threshold loss_spike=0 must be a positive number"):
        Thresholds(loss_spike=0)
    with pytest.raises(UsageError, match=r"port=70000 must be a number from 0 to 65535"):
        Prometheus(70_000)


def test_sinks_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"JsonLines\(.*\) cannot be opened: (File|Not a)"):
        Monitor(Net(), sinks=[JsonLines(tmp_path / "file" / "run.jsonl")])
    sink = Prometheus(0)
    sink.open()
    with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1:{sink.port}: Address al"):
        Monitor(Net(), sinks=[Prometheus(sink.port)])
    sink.close()


def test_a_forgotten_loss_is_an_error() -> None:
    model, optimizer = plain()
    monitor = Monitor(model, optimizer=optimizer)
    with (
        pytest.raises(UsageError, match=r"no loss was told in step 1\n  call step\.loss\(loss\)"),
        monitor.step(batch(1)),
    ):
        one_step(model, optimizer, (batch(1),))
    train(model, optimizer, 50, monitor)  # and may be mended
    assert monitor.steps == 51


def test_losses_are_single_numbers() -> None:
    monitor = Monitor(Net())
    with monitor.step() as step:
        with pytest.raises(UsageError, match=r"step\.loss takes one number, not a tensor \[3\]"):
            step.loss(torch.ones(3))
        with pytest.raises(UsageError, match=r"step\.gradient_norm takes a number, not str"):
            step.gradient_norm("1")  # type: ignore[arg-type]
        with (
            pytest.raises(UsageError, match=r"a step of the monitor began inside another one"),
            monitor.step(),
        ):
            pass
        step.loss(1.0)
        step.loss(2)
    assert monitor.steps == 1


def test_an_error_in_the_loop_is_the_loops() -> None:
    model, optimizer = plain()
    monitor = Monitor(model, optimizer=optimizer)
    with pytest.raises(ZeroDivisionError), monitor.step(batch(1)):
        1 / 0  # noqa: B018
    assert monitor.steps == 0
    train(model, optimizer, 1, monitor)
    assert monitor.steps == 1


def test_a_shadow_check_needs_the_models_inputs() -> None:
    model, optimizer = build()
    monitor = Monitor(model, every=2, optimizer=optimizer, shadow_every=2)
    with monitor.step(batch(1, 32)) as step:
        step.loss(one_step(model, optimizer, (batch(1),)))
    with (
        pytest.raises(UsageError, match=r"it was not called with those of monitor\.step"),
        monitor.step(batch(2, 32)) as step,
    ):
        step.loss(one_step(model, optimizer, (batch(2),)))


def test_a_budget_without_room_for_eager_switches_the_shadow_check_off() -> None:
    model, optimizer = build(memory_budget="20KiB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = watched(2, model, optimizer, every=2)
    (note,) = [n for n in records[0].notes if n.startswith("no shadow check")]
    assert note.startswith("no shadow check: an eager micro-batch takes ")
    assert note.endswith(" of 20.0 KiB")
