"""Every error that a user can cause says what is wrong, where, and what would work."""

from __future__ import annotations

import inspect
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero import BudgetError, CaptureError, FxzeroError, UsageError
from fxzero.errors import DeviceError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the branch
            x = x + 1
        return super().forward(x)


class ReadsItem(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.mean().item()  # the number


class Selects(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x[x > 0].view(-1, 1).expand(-1, 16)).mean()  # the selection


class Crashes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ x)  # the crash


X = torch.randn(8, 16)


def message(kind: type[FxzeroError], **options: Any) -> str:
    """The text of the error that compiling and calling a small model raises."""
    with pytest.raises(kind) as caught:
        fxzero.compile(Net(), X, **{"inner": "eager"} | options)
    return str(caught.value)


def trace_error(model: nn.Module) -> str:
    with pytest.raises(CaptureError) as caught:
        fxzero.compile(model, X, inner="eager")
    return str(caught.value)


def line_of(kind: type[nn.Module], marker: str) -> str:
    """'file:line' of the line in ``kind.forward`` that carries a comment."""
    lines, start = inspect.getsourcelines(kind.forward)
    (offset,) = [i for i, line in enumerate(lines) if marker in line]
    return f"{Path(__file__).name}:{start + offset} in forward"


# Budgets that nothing fits.


def test_a_sparse_gradient_is_refused_by_its_parameters_name() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(CaptureError) as caught:
        fxzero.compile(model, torch.tensor([1, 2]), inner="eager")
    assert str(caught.value) == (
        "[FXZ201] cannot plan Sequential: the gradient of 0.weight is torch.sparse_coo\n"
        "  make it dense, for an embedding with sparse=False"
    )


def test_an_impossible_budget_is_refused_with_both_numbers_and_what_cannot_be_freed() -> None:
    with pytest.raises(BudgetError) as caught:
        fxzero.compile(Net(), X, memory_budget="1KiB", optimizer="adamw", inner="eager")
    error = caught.value
    lines = str(error).splitlines()
    assert lines[0] == "[FXZ102] no plan fits memory_budget=1.00 KiB (1024 bytes)"
    assert lines[1].startswith("  smallest reachable peak  ")
    assert f"({error.required_bytes} bytes)" in lines[1]
    parameters = 4 * sum(p.numel() for p in Net().parameters())
    assert error.fixed["parameter"] == error.fixed["gradients"] == parameters
    assert error.fixed["optimizer"] == 2 * parameters + 4 * 4
    assert error.fixed["input"] == 4 * X.numel()
    assert error.fixed_bytes == sum(error.fixed.values()) <= error.required_bytes
    for name in ("parameter", "gradients", "optimizer", "input"):
        assert f"{name} " in lines[2]
    assert lines[3] == "  any one of these fits"


def test_what_the_error_for_an_impossible_budget_offers_does_fit() -> None:
    with pytest.raises(BudgetError) as caught:
        fxzero.compile(Net(), X, memory_budget=1, optimizer="adamw", inner="eager")
    (change, peak), *_ = caught.value.alternatives
    assert peak == caught.value.required_bytes
    budget = change.removeprefix('memory_budget="').removesuffix('"')
    model = fxzero.compile(Net(), X, memory_budget=budget, optimizer="adamw", inner="eager")
    assert model.plan.fits


def test_without_optimizer_state_is_offered_when_that_fits() -> None:
    with pytest.raises(BudgetError) as caught:
        fxzero.compile(Net(), X, memory_budget=1, optimizer="adamw", inner="eager")
    just_below = caught.value.required_bytes - 1
    with pytest.raises(BudgetError) as caught:
        fxzero.compile(Net(), X, memory_budget=just_below, optimizer="adamw", inner="eager")
    assert [change for change, _ in caught.value.alternatives][1:] == ['optimizer="sgd"']
    assert fxzero.compile(
        Net(), X, memory_budget=just_below, optimizer="sgd", inner="eager"
    ).plan.fits


def test_a_budget_error_survives_pickling() -> None:
    with pytest.raises(BudgetError) as caught:
        fxzero.compile(Net(), X, memory_budget=1, inner="eager")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.required_bytes == caught.value.required_bytes


# Options.


@pytest.mark.parametrize(
    ("budget", "what"),
    [
        ("64G B", "'64G B' is malformed"),
        ("0.5", "'0.5' is malformed"),
        ("nan GiB", "'nan GiB' is malformed"),
        ("", "'' is malformed"),
        ("GiB", "'GiB' is malformed"),
        ("-1GiB", "'-1GiB' must be positive"),
        ("0GiB", "'0GiB' must be positive"),
        ("0", "0 must be positive"),
        ("-5", "-5 must be positive"),
        ("120%", "'120%' must lie above 0% and at most 100%"),
        ("0%", "'0%' must lie above 0% and at most 100%"),
        (0.5, "0.5 looks like a fraction"),
        (-1, "-1 must be positive"),
        (-1.0, "-1.0 must be a positive whole number"),
        (0, "0 must be positive"),
        (True, "True is not a number of bytes"),
        (1024.5, "1024.5 must be a positive whole number"),
        (math.nan, "nan is not a finite number"),
        (math.inf, "inf is not a finite number"),
        ([1], "[1] is not a number of bytes"),
    ],
)
def test_a_malformed_budget_is_refused_with_what_to_write(budget: object, what: str) -> None:
    text = message(UsageError, memory_budget=budget)
    assert text.startswith(f"[FXZ101] memory_budget={what}")
    assert "%" in str(budget) or '"22GiB"' in text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"memory_buget": 1}, "'memory_buget'; did you mean 'memory_budget'?"),
        ({"optimiser": "sgd"}, "'optimiser'; did you mean 'optimizer'?"),
        ({"xyzzy": 1}, "'xyzzy'\n  known: example_inputs, inner,"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(
    options: dict[str, Any], what: str
) -> None:
    assert message(UsageError, **options).startswith(
        f"[FXZ101] fxzero.compile: unknown option {what}"
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"optimizer": "adamm"}, "optimizer: unknown option 'adamm'; did you mean 'adam'?"),
        ({"optimizer": -1}, "optimizer=-1 must be a finite number of bytes"),
        ({"optimizer": object}, "optimizer: unknown option 'object'"),
        ({"optimizer": None}, "optimizer=None must be a name, a torch.optim class, or bytes"),
        ({"objective": "tim"}, "objective: unknown option 'tim'; did you mean 'time'?"),
        ({"inner": "egger"}, "inner: unknown option 'egger'; did you mean 'eager'?"),
        ({"recompute": "all"}, "recompute='all' must be one of 'auto', 'none', 'full', or a func"),
        ({"zero": 4}, 'zero=4 must be 0, 1, 2, 3 or "auto"'),
        ({"pipeline": "best"}, "pipeline='best' must be a number of stages, a fxzero.Pipeline or"),
        ({"offload": 1}, "offload=1 must be True or False"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options: dict[str, Any], what: str) -> None:
    assert message(UsageError, **options).startswith(f"[FXZ101] {what}")


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[FXZ101\] fxzero.compile needs an nn.Module, not func"):
        fxzero.compile(lambda x: x)


def test_a_recompute_function_with_a_wrong_answer_is_refused_with_the_node() -> None:
    text = message(UsageError, recompute=lambda node: "maybe")
    assert "recompute(node) returned 'maybe' for t; expected" in text


# Models that cannot be traced.


@pytest.mark.parametrize(
    ("kind", "marker", "what"),
    [
        (Branches, "# the branch", "its control flow or a shape depends on the value of a tensor"),
        (ReadsItem, "# the number", "the value of a tensor becomes a Python number or a shape"),
        (Selects, "# the selection", "the value of a tensor becomes a Python number or a shape"),
    ],
)
def test_values_that_decide_what_runs_are_refused_at_the_users_line(
    kind: type[nn.Module], marker: str, what: str
) -> None:
    text = trace_error(kind())
    assert text.startswith(f"[FXZ201] cannot trace {kind.__name__}: {what}")
    assert f"{line_of(kind, marker)}: " in text
    assert "torch.where instead of `if`" in text


def test_what_the_model_raises_is_named_at_the_users_line() -> None:
    text = trace_error(Crashes())
    assert text.startswith("[FXZ201] cannot trace Crashes: ")
    assert f"{line_of(Crashes, '# the crash')}: return super().forward(x @ x)" in text
    assert "run the model eagerly" in text


def test_a_model_without_anything_to_differentiate_is_refused() -> None:
    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            return (self.up(x) > 0).sum()

    assert "Counts returns nothing that requires a gradient" in trace_error(Counts())


def test_an_input_on_another_device_is_refused_by_its_place() -> None:
    model = fxzero.compile(Net(), inner="eager")
    with pytest.raises(DeviceError) as caught:
        model(x=X.to("meta"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("[FXZ202] input ")
    assert "input x lies on meta, the parameters of Net on cpu" in lines[0]
    assert lines[1] == '  move it: batch.to("cpu"), or the model: model.to("meta")'


# Use.


def test_a_model_without_a_plan_says_when_there_will_be_one() -> None:
    with pytest.raises(UsageError, match="there is no plan yet: it is made at the first call"):
        _ = fxzero.compile(Net(), inner="eager").plan


def test_step_needs_a_scalar_loss() -> None:
    class Logits(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    model = fxzero.compile(Logits(), inner="eager")
    with pytest.raises(UsageError, match=r"step\(\) needs a scalar loss, but the model ret"):
        model.step(X)
