"""A budget changes where memory goes and nothing else: every zoo model, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from helpers import NOT_TRACED_AS_RUN, Outcome, Subject, assert_equal, assert_same, eager, tiers

import fxzero
from fxzero import BudgetError

pytestmark = pytest.mark.usefixtures("shared_solvers")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        # test_spec.py checks the law on every zoo model.
        patch.setenv("FXZERO_SPEC", "0")
        made = Subject(request.param)
        patch.setattr("fxzero.training_step.capture", made.capture)
        yield made


def reference(subject: Subject) -> tuple[Outcome, ...]:
    """Two eager steps, or where tracing changes the model, two of the traced one as it is."""
    if subject.name not in NOT_TRACED_AS_RUN:
        return eager(subject.name)
    subject.compile(recompute="none")
    return subject.run(0), subject.run(1)


def budget_of(subject: Subject, share: str) -> int:
    if share == "minimum":
        return subject.required
    return eager(subject.name)[0].peak * int(share.removesuffix("%")) // 100


every_model = pytest.mark.parametrize(
    "subject",
    tiers(
        zoo.CASES,
        quick=("rand_ops",),
        exhaustive=(
            *("mixtral", "t5", "bert", "vit", "llama_bf16"),
            *("kwargs_only", "logging", "no_loss", "dataclass_output"),
            *("tied", "unused_parameter", "buffers", "module_twice"),
        ),
    ),
    indirect=True,
)


@every_model
@pytest.mark.parametrize(
    "share",
    [
        "100%",
        pytest.param("60%", marks=pytest.mark.exhaustive),
        pytest.param("40%", marks=pytest.mark.exhaustive),
        "minimum",
    ],
)
def test_a_step_equals_eager_bitwise_and_its_peak_is_the_planned_one(
    subject: Subject, share: str
) -> None:
    budget, required = budget_of(subject, share), subject.required
    expected = reference(subject)
    model = subject.compile(budget)
    if budget < required:
        with pytest.raises(BudgetError) as caught:
            subject.run()
        assert caught.value.required_bytes == required
        return
    for seed in range(2):
        found = subject.run(seed)
        assert_same(found, expected[seed])
        assert found.peak <= model.plan.peak_bytes <= budget
        assert model.plan.peak_bytes <= 1.05 * found.peak


@every_model
def test_one_byte_less_than_the_required_budget_is_refused(subject: Subject) -> None:
    required = subject.required
    subject.compile(required - 1)
    with pytest.raises(BudgetError) as caught:
        subject.run()
    assert caught.value.required_bytes == required


def training(model: Any, subject: Subject, optimizer: torch.optim.Optimizer) -> Any:
    args, kwargs, loss = subject.args, subject.kwargs, subject.loss

    def step() -> None:
        optimizer.zero_grad()
        loss(model(*args, **kwargs)).backward()
        optimizer.step()

    return step


def train(model: Any, subject: Subject) -> int:
    """Five steps; returns the measured peak of the last one."""
    step = training(model, subject, torch.optim.AdamW(model.parameters(), lr=1e-3))
    torch.manual_seed(0)
    for _ in range(4):
        step()
    return fxzero.measure(step).peak_bytes


@pytest.mark.parametrize(
    "subject",
    tiers(("rand_ops", "gpt2", "frozen", "vit", "unused_parameter"), quick=("rand_ops",)),
    indirect=True,
)
def test_five_steps_of_adamw_leave_eagers_parameters_within_the_planned_peak(
    subject: Subject,
) -> None:
    plain, *_ = zoo.build(subject.name)
    eager_peak = train(plain, subject)
    model = subject.compile(eager_peak * 6 // 10, optimizer="adamw")
    peak = train(model, subject)
    assert_equal(model.state_dict(), plain.state_dict())
    assert peak <= model.plan.peak_bytes <= eager_peak * 6 // 10
    assert model.plan.peak_bytes <= 1.05 * peak
